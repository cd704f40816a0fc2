"""vLLM plugin: lets stock vLLM load checkpoints that hold beacon weights, which its own classes stop at.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`).
"""

ARCHITECTURES = ("Qwen2ForCausalLM", "MistralForCausalLM", "LlamaForCausalLM")


def register() -> None:
    """Puts classes that skip beacon weights in the place of vLLM's own; published MemoRAG checkpoints name the same."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"memory_worker.recall.vllm_classes:{name}")
