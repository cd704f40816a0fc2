"""Rotary position embedding of a memory model, as its checkpoint's config describes it.

The beacon model rotates with it while it memorizes, the vLLM connector when it puts a memory's keys at slots
`0 … M-1`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCALINGS = ("default", "linear", "yarn", "llama3")


class UnsupportedRope(ValueError):
    """The checkpoint's RoPE depends on the sequence's length or rotates only part of a head."""


@dataclass(frozen=True)
class Rope:
    """Frequencies and scale; positions may be any integers from 0."""

    frequencies: Tensor  # [head_dim / 2] float32
    scale: float  # on cosines and sines: yarn's attention factor

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path) -> "Rope":
        """From a checkpoint's config: its content, its file, or the checkpoint's folder.

        Reads `rope_parameters` as well as the older `rope_theta` and `rope_scaling`. Raises `UnsupportedRope` for
        scalings other than `SCALINGS`.
        """
        if isinstance(config, str | Path):
            file = Path(config)
            read = (file / "config.json" if file.is_dir() else file).read_text(encoding="utf-8")
            return cls.from_config(json.loads(read))
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        parameters = rope_parameters(config)
        kind = parameters["rope_type"]
        if kind in ("default", "linear"):
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            return cls(1.0 / parameters["rope_theta"] ** exponents / parameters.get("factor", 1.0), 1.0)
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        stock = LlamaConfig(
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            head_dim=head_dim,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rope_parameters=parameters,
        )
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](stock, torch.device("cpu"))
        return cls(frequencies, float(scale))

    def to(self, device: torch.device | str) -> "Rope":
        """The same with its frequencies on `device`."""
        return Rope(self.frequencies.to(device), self.scale)

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [slots, head_dim / 2] float32, of integer `positions` [slots]."""
        angles = positions.to(torch.float32)[:, None] * self.frequencies.to(positions.device)
        return angles.cos() * self.scale, angles.sin() * self.scale

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """`keys` [..., slots, head_dim] turned to `positions` [slots], computed in float32, in the dtype of `keys`."""
        return rotate_by(keys, *self.table(positions.to(keys.device)))


def rotate_by(keys: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`keys` [..., slots, head_dim] turned by a `Rope.table` [slots, head_dim / 2], in the dtype of `keys`."""
    first, second = keys.to(torch.float32).chunk(2, dim=-1)
    turned = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    half = first.shape[-1]
    turned[..., :half] = (first * cosines).addcmul_(second, sines, value=-1)
    turned[..., half:] = (second * cosines).addcmul_(first, sines)
    return turned


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE settings of a checkpoint's config under their present names, `rope_type` and `rope_theta` included.

    Raises `UnsupportedRope`.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = {key: value for key, value in found.items() if key != "type"}
    parameters["rope_type"] = kind = found.get("rope_type") or found.get("type") or "default"
    parameters["rope_theta"] = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    if kind not in SCALINGS:
        raise UnsupportedRope(
            f"RoPE of type {kind!r} cannot place a memory's slots: its frequencies are not the same at every length; "
            f"use a checkpoint whose rope_type is one of {', '.join(SCALINGS)}"
        )
    if found.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UnsupportedRope("RoPE over a part of each head is not supported; partial_rotary_factor must be 1")
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = (
            found.get("original_max_position_embeddings")
            or config.get("original_max_position_embeddings")
            or config["max_position_embeddings"]
        )
    return parameters
