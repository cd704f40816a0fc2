"""Slots: memory keys and values as tensors. What `BeaconModel` returns and continues from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Consecutive slots of a memory. Keys are unrotated; both tensors share dtype and device."""

    keys: Tensor  # [layers, kv_heads, slots, head_dim]
    values: Tensor  # [layers, kv_heads, slots, head_dim]

    def __len__(self) -> int:
        return int(self.keys.shape[2])

    def cut(self, start: int, end: int) -> "Slots":
        """Slots `start … end`, a view."""
        return Slots(self.keys[:, :, start:end], self.values[:, :, start:end])

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return (self.keys.numel() + self.values.numel()) * self.keys.element_size()

    def expect(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raises `ValueError` if they are not of a model of this shape."""
        if (*self.keys.shape[:2], self.keys.shape[3]) != (layers, kv_heads, head_dim):
            raise ValueError(f"the memory's slots are {tuple(self.keys.shape)}: they are of another model")

    @staticmethod
    def concat(parts: Sequence["Slots"]) -> "Slots":
        """`parts` (one at least) one after another, as a copy: how a memory is composed of head and segments."""
        return Slots(torch.cat([p.keys for p in parts], dim=2), torch.cat([p.values for p in parts], dim=2))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Slots":
        """The same on `device`, in `dtype` if given."""
        return Slots(self.keys.to(device, dtype), self.values.to(device, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one group of windows added to one document."""

    document: int  # index in the call's list of documents
    tokens: int  # tokens of the document that these slots stand for
    slots: Slots  # they follow those of the document's earlier parts
    last: bool  # the document is complete
    dropped: float = 0.0  # share of the pairs' scores that was dropped: of these tokens, where they were pruned
    counts: npt.NDArray[np.int32] | None = None  # of the pool that the first slots are, where heads have budgets
