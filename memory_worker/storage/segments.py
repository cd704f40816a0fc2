"""Segment files: the unrotated keys and values of consecutive windows of a segment (or of the head), as safetensors.

Two tensors, `keys` and then `values`, each `[layers, slots, kv_heads, head_dim]`: a layer's slots lie together, so that
a loader only copies, and both together are one array. Before them, where heads have budgets, lie the `counts` of a
pool (`head_pools`). The Memorizer writes them, the MemoryKeeper reads them memory-mapped.
"""

import warnings
from collections.abc import Iterator, Sequence
from io import RawIOBase
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from cluster.storage.tensors import view_tensors, write_tensors
from memory_worker.errors import DamagedMemory
from memory_worker.head_pools import Counts, check_counts
from memory_worker.manifest import MemoryShape, SlotDtype

if TYPE_CHECKING:
    import torch

SEGMENT_FORMAT = "memorag-segment-2"
_DTYPES: dict[SlotDtype, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

Raw = npt.NDArray[Any]  # float32 as itself; the 16-bit types as their bits in uint16


def write_slots(
    sink: IO[bytes] | RawIOBase,
    shape: MemoryShape,
    parts: "Sequence[tuple[torch.Tensor, torch.Tensor]]",
    counts: Counts | None = None,
) -> None:
    """Writes a segment file of these keys and values, one part after another.

    Each is `[layers, kv_heads, slots, head_dim]` in the dtype of the shape, on any device; `counts` are those of the
    pool that the first slots are, if they are one.
    """
    for tensor in (tensor for pair in parts for tensor in pair):
        expected = (shape.layers, shape.kv_heads, tensor.shape[2], shape.head_dim)
        if tuple(tensor.shape) != expected or str(tensor.dtype) != f"torch.{shape.dtype}":
            raise ValueError(f"slots are {tensor.dtype} {list(tensor.shape)}, not {shape.dtype} {list(expected)}")
    slots = sum(keys.shape[2] for keys, _ in parts)
    described = (_DTYPES[shape.dtype], (shape.layers, slots, shape.kv_heads, shape.head_dim))
    layers = (
        _layer(tensor, layer) for kind in zip(*parts, strict=True) for layer in range(shape.layers) for tensor in kind
    )
    tensors: dict[str, tuple[str, Sequence[int]]] = {"keys": described, "values": described}
    pool: list[Counts] = []
    if counts is not None:
        check_counts(counts, shape.layers, shape.kv_heads, slots)
        tensors, pool = {"counts": ("I32", counts.shape)} | tensors, [counts]
    write_tensors(sink, tensors, {"format": SEGMENT_FORMAT}, chain(pool, layers))


class Segment:
    """A segment file read from a buffer, which `raw` is a view of.

    Raises `DamagedMemory` where the bytes are not a segment; everything is checked before anything is handed out.
    """

    raw: Raw  # [2, layers, slots, kv_heads, head_dim], keys first; not to be written to
    counts: Counts | None  # of the pool that the first slots are, if they are one

    def __init__(self, buffer: pa.Buffer, path: str) -> None:
        self.path = path
        try:
            stored = view_tensors(buffer)
        except ValueError as error:
            raise DamagedMemory(path, f"cannot be read: {error}") from error
        if (found := stored.metadata.get("format")) != SEGMENT_FORMAT:
            raise DamagedMemory(path, f"has the format {found!r}; this version reads {SEGMENT_FORMAT!r}")
        named = {(("keys", name), ("values", name)): dtype for dtype, name in _DTYPES.items()}
        pooled = next(iter(stored.dtypes.items()), None) == ("counts", "I32")
        if (dtype := named.get((*stored.dtypes.items(),)[pooled:])) is None:  # type: ignore[arg-type]
            raise DamagedMemory(path, f"has the tensors {stored.dtypes}, not keys and values of a memory")
        keys, values = stored.arrays["keys"], stored.arrays["values"]
        if keys.shape != values.shape or keys.ndim != 4 or not keys.size:
            raise DamagedMemory(path, f"has keys {keys.shape} and values {values.shape}: no slots of one shape")
        layers, self.slots, kv_heads, head_dim = keys.shape
        try:
            self.shape = MemoryShape(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        except ValidationError as error:
            raise DamagedMemory(path, f"has keys of an impossible shape: {keys.shape}") from error
        self.counts = stored.arrays["counts"] if pooled else None
        if self.counts is not None:
            try:
                check_counts(self.counts, layers, kv_heads, self.slots)
            except ValueError as error:
                raise DamagedMemory(path, f"cannot be read: {error}") from error
        # The values lie right behind the keys, at the end of the file.
        both = np.frombuffer(
            buffer, np.float32 if dtype == "float32" else np.uint16, offset=buffer.size - keys.nbytes - values.nbytes
        )
        self.raw = both.reshape(2, *keys.shape)
        self.raw.flags.writeable = False  # a mapped file must not be written to

    def expect(self, shape: MemoryShape, slots: int) -> None:
        """Raises `DamagedMemory` unless the segment has this shape and this many slots."""
        if (self.shape, self.slots) != (shape, slots):
            raise DamagedMemory(
                self.path, f"holds {self.slots} slots of {self.shape}, its manifest says {slots} of {shape}"
            )

    def chunks(self, max_bytes: int) -> Iterator[Raw]:
        """Consecutive slots, `[2, layers, slots, kv_heads, head_dim]` each: `raw` itself, or copies of parts of it.

        Each has at most `max_bytes`, or one slot where that alone is larger.
        """
        step = max(1, max_bytes // self.shape.slot_bytes)
        for start in range(0, self.slots, step):
            yield np.ascontiguousarray(self.raw[:, :, start : start + step])

    def tensors(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Keys and values of the whole file, `[layers, kv_heads, slots, head_dim]`, copied."""
        keys, values = as_torch(self.raw, self.shape.dtype).transpose(2, 3).contiguous()
        return keys, values


def as_torch(raw: Raw, dtype: str) -> "torch.Tensor":
    """`raw` as a tensor of `dtype` that shares its memory and must not be written to."""
    import torch

    target: torch.dtype = getattr(torch, dtype)
    with warnings.catch_warnings():  # raw is read-only where it lies in a file or in the object store
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(raw).view(target)


def _layer(tensor: "torch.Tensor", layer: int) -> Raw:
    """A layer's `[kv_heads, slots, head_dim]` on any device as bytes of `[slots, kv_heads, head_dim]`."""
    import torch

    return tensor[layer].detach().transpose(0, 1).contiguous().cpu().view(torch.uint8).numpy()
