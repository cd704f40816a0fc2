"""Where the models run: GPU pools, vLLM engines on them, durable storage, deployable configurations."""
