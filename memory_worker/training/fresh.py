"""New models of Qwen2 shape, and their growth: a small one is taught first, where steps are cheap, then widened."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_worker.models.embedded import KNOWS
from memory_worker.models.qwen2 import qwen2_config
from memory_worker.training.config import FreshConfig, TokenizerConfig
from memory_worker.training.data import import_function, records
from memory_worker.training.model import BEACON_MARK, TrainedModel
from memory_worker.training.tokenizer import write_training_tokenizer

_LOCAL_STRENGTH = 6.5  # of queries and keys of local heads: the right distance wins by e^5 over its neighbours
_LOCAL_PAIRS = 4  # of the fastest rotary frequencies, which tell near distances apart


def fresh_config(settings: FreshConfig, vocabulary: int) -> dict[str, Any]:
    """The config.json of a new model."""
    config = qwen2_config(
        vocabulary=vocabulary,
        layers=settings.layers,
        hidden=settings.hidden,
        heads=settings.heads,
        kv_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        mlp=settings.mlp,
        window=settings.window,
        ratios=settings.ratios,
        rope_theta=settings.rope_theta,
        max_positions=settings.max_positions,
        tied=settings.tied,
    )
    if settings.rope_scaling:
        config["rope_scaling"] = dict(settings.rope_scaling)
    if settings.knows:
        config[KNOWS] = settings.knows
    return config


def write_fresh_tokenizer(folder: Path, settings: TokenizerConfig) -> int:
    """Makes the tokenizer of a new model in `folder`; returns the size of its vocabulary."""
    return write_training_tokenizer(folder, _texts(settings), settings.vocabulary, settings.phrases)


def fresh_model(config: Mapping[str, Any], seed: int, *, local_heads: bool) -> TrainedModel:
    """A new model. Equal seeds give equal weights.

    With `local_heads`, head h of layer 0 begins by looking h + 1 tokens back, and two of layer 1 as far back as those
    reach and twice as far: queries and keys get constant biases that differ by that rotation. A layer above can then
    match what stands before a token, which is most of what copying takes, and which otherwise costs millions of
    tokens to find. All of it stays trainable.
    """
    model = TrainedModel(dict(config))
    random = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * config["num_hidden_layers"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                scale = 1 / math.sqrt(parameter.shape[1])
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    scale /= depth
                parameter.copy_(torch.randn(parameter.shape, generator=random) * scale)
        for layer in model.model.layers:  # beacons begin as ordinary tokens do
            for part in "qkv":
                stock = getattr(layer.self_attn, f"{part}_proj")
                getattr(layer.self_attn, f"{BEACON_MARK}{part}_proj").weight.copy_(stock.weight)
        if local_heads:
            heads = config["num_attention_heads"]
            _look_back(model.model.layers[0].self_attn, model.rope.frequencies, range(1, heads + 1))
            if len(model.model.layers) > 1:
                _look_back(model.model.layers[1].self_attn, model.rope.frequencies, (heads, 2 * heads)[: heads // 2])
    return model


def _look_back(attention: Any, frequencies: Tensor, distances: Sequence[int]) -> None:
    """Its first heads look so many tokens back; those that share keys differ in their queries alone."""
    half = attention.head_dim // 2
    pairs = min(_LOCAL_PAIRS, half)
    shared = attention.heads // attention.kv_heads
    for prefix in ("", BEACON_MARK):
        keys = getattr(attention, f"{prefix}k_proj").bias.view(attention.kv_heads, 2, half)
        # No token looks back at a beacon.
        keys[: -(-len(distances) // shared), 0, :pairs] = _LOCAL_STRENGTH if not prefix else -_LOCAL_STRENGTH
        queries = getattr(attention, f"{prefix}q_proj").bias.view(attention.heads, 2, half)
        for head, distance in enumerate(distances):
            angle = -distance * frequencies[:pairs]
            queries[head, 0, :pairs] = _LOCAL_STRENGTH * angle.cos()
            queries[head, 1, :pairs] = _LOCAL_STRENGTH * angle.sin()


def _texts(settings: TokenizerConfig) -> Iterator[str]:
    for record in records(settings.files):
        yield record["text"]
    if settings.generator:
        yield from import_function(settings.generator)()
