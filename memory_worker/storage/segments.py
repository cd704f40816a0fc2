"""Segment files: the unrotated keys and values of consecutive windows of a segment (or of the head) as Arrow IPC.

One record batch per window, one row each: `slots`, and `keys`, `values` as raw little-endian bytes of
`[layers, slots, kv_heads, head_dim]`, so that a layer's slots lie together and a loader only copies. Shape and
dtype stand in the schema's metadata. The Memorizer writes them, the MemoryKeeper reads them memory-mapped.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from typing import IO, TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memory_worker.errors import DamagedMemory
from memory_worker.storage.arrow_footer import require_plain
from memory_worker.storage.manifest import MemoryShape, SlotDtype

if TYPE_CHECKING:
    import torch

SEGMENT_FORMAT = "memorag-segment-1"
_FIELDS = [
    pa.field("slots", pa.int64(), nullable=False),
    pa.field("keys", pa.large_binary(), nullable=False),
    pa.field("values", pa.large_binary(), nullable=False),
]
_METADATA_KEYS = ("format", "layers", "kv_heads", "head_dim", "dtype")

Raw = npt.NDArray[Any]  # float32 as itself; the 16-bit types as their bits in uint16

assert sys.byteorder == "little", "segments hold little-endian numbers and are used without conversion"


@dataclass(frozen=True, slots=True)
class StoredWindow:
    """One window's slots, views into the file: keys and values `[layers, slots, kv_heads, head_dim]`."""

    keys: Raw
    values: Raw

    @property
    def slots(self) -> int:
        return int(self.keys.shape[1])


class SegmentWriter:
    """Writes one segment file into a binary sink, window by window; `close` finishes it."""

    def __init__(self, sink: IO[bytes] | RawIOBase, shape: MemoryShape) -> None:
        self._shape = shape
        self._schema = _schema(shape)
        self._writer = pa.ipc.new_file(sink, self._schema)
        self.slots = 0  # written so far

    def append(self, keys: "torch.Tensor", values: "torch.Tensor", *, window_slots: int | None = None) -> None:
        """Appends a group of windows; `[layers, kv_heads, slots, head_dim]` in the dtype of the shape, any device.

        The group is cut into windows of `window_slots`, the last may be shorter; without it, it is one window.
        """
        shape, slots = self._shape, keys.shape[2]
        expected = (shape.layers, shape.kv_heads, slots, shape.head_dim)
        for name, tensor in (("keys", keys), ("values", values)):
            if tuple(tensor.shape) != expected or str(tensor.dtype) != f"torch.{shape.dtype}":
                raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)}, not {shape.dtype} {list(expected)}")
        step = window_slots or max(slots, 1)
        for start in range(0, slots, step):
            count = min(step, slots - start)
            row = [_raw_bytes(tensor[:, :, start : start + count]) for tensor in (keys, values)]
            columns = [pa.array([count], pa.int64()), *(_one_row(part) for part in row)]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
            self.slots += count

    def close(self) -> None:
        self._writer.close()


class Segment:
    """A segment file read from a buffer, which its windows are views of.

    Raises `DamagedMemory` where the bytes are not a segment; everything is checked before anything is handed out.
    """

    def __init__(self, buffer: pa.Buffer, path: str) -> None:
        self.path = path
        try:
            require_plain(memoryview(buffer))
            reader = pa.ipc.open_file(buffer)
            self.shape = _shape(reader.schema, path)
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DamagedMemory(path, f"is not a readable Arrow file ({str(error).splitlines()[0]})") from error
        self._windows = [self._window(batch) for batch in batches]
        self.slots = sum(window.slots for window in self._windows)
        if self.slots * self.shape.slot_bytes > buffer.size:  # keys and values that are the same bytes
            raise DamagedMemory(path, f"has {buffer.size} bytes, and claims {self.slots} slots of {self.shape}")

    @property
    def windows(self) -> list[StoredWindow]:
        return self._windows

    def expect(self, shape: MemoryShape, slots: int) -> None:
        """Raises `DamagedMemory` unless the segment has this shape and this many slots."""
        if (self.shape, self.slots) != (shape, slots):
            raise DamagedMemory(
                self.path, f"holds {self.slots} slots of {self.shape}, its manifest says {slots} of {shape}"
            )

    def chunks(self, max_bytes: int) -> Iterator[Raw]:
        """Copies of whole consecutive windows, `[2, layers, slots, kv_heads, head_dim]` with the keys first.

        Each has at most `max_bytes`, or one window where that alone is larger.
        """
        run: list[StoredWindow] = []
        limit = max(1, max_bytes // self.shape.slot_bytes)
        for window in self._windows:
            if run and sum(w.slots for w in run) + window.slots > limit:
                yield _join(run)
                run = []
            run.append(window)
        if run:
            yield _join(run)

    def tensors(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Keys and values of the whole file, `[layers, kv_heads, slots, head_dim]`, copied."""
        whole = _join(self._windows) if self._windows else _empty(self.shape)
        keys, values = as_torch(whole, self.shape.dtype).transpose(2, 3).contiguous()
        return keys, values

    def _window(self, batch: pa.RecordBatch) -> StoredWindow:
        if batch.num_rows != 1:
            raise DamagedMemory(self.path, f"has a record batch of {batch.num_rows} rows instead of 1")
        if any(column.null_count for column in batch.columns):  # validation does not ask whether there may be any
            raise DamagedMemory(self.path, "has a record batch in which something is null")
        slots = batch.column(0)[0].as_py()
        shape = (self.shape.layers, slots, self.shape.kv_heads, self.shape.head_dim)
        parts = []
        for column in (1, 2):
            data = batch.column(column)[0].as_buffer()
            if slots < 1 or data.size * 2 != slots * self.shape.slot_bytes:
                raise DamagedMemory(self.path, f"has {data.size} bytes of {_FIELDS[column].name} for {slots} slots")
            part = np.frombuffer(data, dtype=numpy_dtype(self.shape.dtype)).reshape(shape)
            part.flags.writeable = False  # a mapped file must not be written to
            parts.append(part)
        return StoredWindow(*parts)


def numpy_dtype(dtype: str) -> type[np.generic]:
    """How raw slots of this dtype lie in numpy arrays."""
    return np.float32 if dtype == "float32" else np.uint16


def as_torch(raw: Raw, dtype: str) -> "torch.Tensor":
    """`raw` as a tensor of `dtype` that shares its memory and must not be written to."""
    import torch

    target: torch.dtype = getattr(torch, dtype)
    with warnings.catch_warnings():  # raw is read-only where it lies in a file or in the object store
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(raw).view(target)


def _schema(shape: MemoryShape) -> pa.Schema:
    metadata = {"format": SEGMENT_FORMAT, **{k: str(v) for k, v in shape.model_dump().items()}}
    return pa.schema(_FIELDS, metadata=metadata)


def _shape(schema: pa.Schema, path: str) -> MemoryShape:
    metadata = {key.decode("utf-8", "replace"): value for key, value in (schema.metadata or {}).items()}
    if not schema.remove_metadata().equals(pa.schema(_FIELDS)) or sorted(metadata) != sorted(_METADATA_KEYS):
        raise DamagedMemory(path, "is an Arrow file but not a segment")
    text = {key: value.decode("ascii", "replace") for key, value in metadata.items()}
    if text["format"] != SEGMENT_FORMAT:
        raise DamagedMemory(path, f"has the format {text['format']!r}; this version reads {SEGMENT_FORMAT!r}")
    numbers = {key: text[key] for key in ("layers", "kv_heads", "head_dim")}
    if text["dtype"] not in get_args(SlotDtype) or not all(
        n.isdigit() and 0 < int(n) < 2**20 for n in numbers.values()
    ):
        raise DamagedMemory(path, f"has an impossible shape: {numbers} of {text['dtype']!r}")
    return MemoryShape(dtype=text["dtype"], **{key: int(number) for key, number in numbers.items()})


def _raw_bytes(tensor: "torch.Tensor") -> Raw:
    """`[layers, kv_heads, slots, head_dim]` on any device as bytes of `[layers, slots, kv_heads, head_dim]`."""
    import torch

    return tensor.detach().transpose(1, 2).contiguous().cpu().view(torch.uint8).numpy().reshape(-1)


def _one_row(data: Raw) -> pa.LargeBinaryArray:
    offsets = pa.py_buffer(np.array([0, data.nbytes], dtype=np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(data)])


def _join(windows: list[StoredWindow]) -> Raw:
    layers, _, kv_heads, head_dim = windows[0].keys.shape
    slots = sum(window.slots for window in windows)
    joined = np.empty((2, layers, slots, kv_heads, head_dim), dtype=windows[0].keys.dtype)
    start = 0
    for window in windows:
        joined[0, :, start : start + window.slots] = window.keys
        joined[1, :, start : start + window.slots] = window.values
        start += window.slots
    return joined


def _empty(shape: MemoryShape) -> Raw:
    return np.empty((2, shape.layers, 0, shape.kv_heads, shape.head_dim), dtype=numpy_dtype(shape.dtype))
