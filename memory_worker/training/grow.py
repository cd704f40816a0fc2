"""Growing a model between stages: more layers, wider, more heads, and the same outputs until it is trained on."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memory_worker.training.config import TrainingError
from memory_worker.training.fresh import fresh_model

_CONFIG = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
}
_WRITES = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")


def grow(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], sizes: Mapping[Any, int], seed: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of the larger model.

    What is new reads from everything and writes nothing: its output rows and columns are zero, so the outputs stay
    (to rounding), and its gradients are not. New layers come on top. Raises `TrainingError` for sizes that are smaller,
    or that change how many query heads share a key head.
    """
    grown = dict(config)
    for what, size in sizes.items():
        if size < config[_CONFIG[what]]:
            raise TrainingError(f"a stage grows {what} to {size} from {config[_CONFIG[what]]}: growing only adds")
        grown[_CONFIG[what]] = size
    if grown["num_attention_heads"] * config["num_key_value_heads"] != (
        config["num_attention_heads"] * grown["num_key_value_heads"]
    ):
        raise TrainingError("a stage grows heads and kv_heads by different factors: grow both alike")
    narrower = math.sqrt(config["hidden_size"] / grown["hidden_size"])  # new zeros lower the mean square of a row
    made = fresh_model(grown, seed + 1, local_heads=False).state_dict()
    with torch.no_grad():
        for name, new in made.items():
            old = weights.get(name)
            if old is None:
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    new.zero_()
                continue
            if name.endswith("norm.weight"):
                new.fill_(float(old.mean()) * narrower)
                new[: len(old)] = old * narrower
                continue
            if name.endswith(_WRITES):
                new.zero_()
            new[tuple(slice(size) for size in old.shape)] = old
    return grown, made
