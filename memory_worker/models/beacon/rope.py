"""Rotary position embedding of a memory model, as its checkpoint's config describes it.

The beacon model rotates with it while it memorizes, the vLLM connector when it puts a memory's keys at slots
`0 … M-1`. `StockModel` turns back with it what transformers has rotated, and tests that this is so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import MessageError

SCALINGS = ("default", "linear", "yarn", "llama3")
# Model types that turn neighbours in a head together, as in the RoPE paper (arXiv 2104.09864); all others turn a place
# in the first half with one in the second.
INTERLEAVED = ("cohere", "ernie4_5", "glm", "glm4", "helium")


class UnsupportedRope(MessageError, ValueError):
    """The checkpoint's RoPE depends on the sequence's length, or rotates a part of a head where all is needed."""


@dataclass(frozen=True)
class Rope:
    """Frequencies and scale; positions may be any integers."""

    frequencies: Tensor  # [pairs] float32; a head's first 2 * pairs dimensions are turned, the others left
    scale: float  # on cosines and sines: yarn's attention factor
    interleaved: bool = False  # whether neighbours are pairs
    still: tuple[int, ...] = ()  # layers whose keys have no position at all

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path) -> "Rope":
        """From a checkpoint's config: its content, its file, or the checkpoint's folder.

        Reads `rope_parameters` as well as the older `rope_theta` and `rope_scaling`; what a family leaves to its
        defaults is in the content that transformers has of a config alone. Raises `UnsupportedRope` for scalings other
        than `SCALINGS`.
        """
        if isinstance(config, str | Path):
            file = Path(config)
            read = (file / "config.json" if file.is_dir() else file).read_text(encoding="utf-8")
            return cls.from_config(json.loads(read))
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        parameters = rope_parameters(config)
        kind = parameters["rope_type"]
        interleaved = config.get("model_type") in INTERLEAVED
        still = tuple(layer for layer, turns in enumerate(config.get("no_rope_layers") or ()) if not turns)
        if kind in ("default", "linear"):
            turned = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, turned, 2, dtype=torch.float32) / turned
            frequencies = 1.0 / parameters["rope_theta"] ** exponents / parameters.get("factor", 1.0)
            return cls(frequencies, 1.0, interleaved, still)
        from transformers import PreTrainedConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        stock: Any = PreTrainedConfig(
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            head_dim=head_dim,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rope_parameters=parameters,
        )
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](stock, torch.device("cpu"))
        return cls(frequencies, float(scale), interleaved, still)

    def to(self, device: torch.device | str) -> "Rope":
        """The same with its frequencies on `device`."""
        return replace(self, frequencies=self.frequencies.to(device))

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [..., slots, pairs] float32, of integer `positions` [..., slots]."""
        angles = positions.to(torch.float32)[..., None] * self.frequencies.to(positions.device)
        return angles.cos() * self.scale, angles.sin() * self.scale

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """`keys` [..., slots, head_dim] turned to `positions` [slots], computed in float32, in the dtype of `keys`."""
        return rotate_by(keys, *self.table(positions.to(keys.device)), interleaved=self.interleaved)

    def shift_layers(self, keys: Tensor, shifts: Tensor) -> Tensor:
        """Keys [layers, kv_heads, slots, head_dim] such that each, turned to a position, stands at one further by its
        own of `shifts` [layers, kv_heads, slots], integers of either sign."""
        cosines, sines = (part / self.scale for part in self.table(shifts.to(keys.device)))
        turned = rotate_by(keys, cosines, sines, interleaved=self.interleaved)
        for layer in self.still:
            turned[layer] = keys[layer]
        return turned

    def rotate_layers(self, keys: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """As `rotate`, of all layers: `keys` [layers, kv_heads, slots, head_dim]; or `back` from those positions."""
        cosines, sines = self.table(positions.to(keys.device))
        if back:
            cosines, sines = cosines / self.scale**2, -sines / self.scale**2
        turned = rotate_by(keys, cosines, sines, interleaved=self.interleaved)
        for layer in self.still:
            turned[layer] = keys[layer]
        return turned


def rotate_by(keys: Tensor, cosines: Tensor, sines: Tensor, *, interleaved: bool = False) -> Tensor:
    """`keys` [..., slots, head_dim] turned by a `Rope.table` [..., slots, pairs], in the dtype of `keys`."""
    pairs = cosines.shape[-1]

    def split(heads: Tensor) -> tuple[Tensor, Tensor]:
        if interleaved:
            return heads[..., 0 : 2 * pairs : 2], heads[..., 1 : 2 * pairs : 2]
        return heads[..., :pairs], heads[..., pairs : 2 * pairs]

    first, second = split(keys.to(torch.float32))
    turned = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    turned_first, turned_second = split(turned)
    turned_first.copy_((first * cosines).addcmul_(second, sines, value=-1))
    turned_second.copy_((second * cosines).addcmul_(first, sines))
    turned[..., 2 * pairs :] = keys[..., 2 * pairs :]
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
    part = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        parameters["partial_rotary_factor"] = part
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = (
            found.get("original_max_position_embeddings")
            or config.get("original_max_position_embeddings")
            or config["max_position_embeddings"]
        )
    return parameters
