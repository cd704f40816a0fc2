"""Questions become clues: a vLLM engine whose prompts begin with memory.

`recaller` is the deployment, `groups` cuts a memory into prompts, `connector` and `loading` put its slots into the
engine, `clues` reads what the model wrote.
"""
