"""vLLM plugin: lets stock vLLM load checkpoints that hold beacon weights, which its own classes stop at, and has its
attention read memories whose heads share their slots.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`), and asks this module for a
class by name when it loads a model of it. Recall makes no memory, so that beacon weights are nothing to it.
"""

from functools import lru_cache

from memory_worker.models.beacon.checkpoint import FAMILIES

ARCHITECTURES = {f"{family.capitalize()}ForCausalLM": family for family in FAMILIES}


def register() -> None:
    """Puts classes that skip beacon weights in the place of vLLM's own; published MemoRAG checkpoints name the same."""
    from vllm import ModelRegistry

    from cluster.vllm_internals import register_attention

    register_attention(__name__)
    for name in ARCHITECTURES:  # classes: names vLLM inspects in a process that imports everything (15 s)
        ModelRegistry.register_model(name, __getattr__(name))


@lru_cache
def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    from cluster.vllm_internals import BY_HEAD, attention_by_head, decoder_without

    if name in BY_HEAD:
        by_head: type = attention_by_head(name)
        return by_head
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return decoder_without("beacon", ARCHITECTURES[name], name)
