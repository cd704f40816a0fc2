"""Tensors in stored files, as safetensors: what segments and passage files are read and written through.

Headers are parsed and checked by the safetensors library; the data are views of the buffer that `Storage.read` has
verified. Headers are written here, so that data can be streamed behind them (the library holds a second copy of all of
it) and equal tensors are equal bytes (it writes metadata in any order).
https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError, safe_open

_HEADER_BYTES = 64 << 10  # at most; ours have some hundreds
_ALIGNED = 8
_NUMPY = {
    "I64": np.int64,
    "F32": np.float32,
    "I32": np.int32,
    "F16": np.float16,
    "BF16": np.uint16,  # its bits: numpy has no such numbers
    "U8": np.uint8,
}

assert sys.byteorder == "little", "safetensors hold little-endian numbers, which are used without conversion"


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The contents of a file, in its order; `arrays` are read-only views of it, of bfloat16 as its bits in uint16."""

    arrays: dict[str, npt.NDArray[Any]]
    dtypes: dict[str, str]  # safetensors' names
    metadata: dict[str, str]


def write_tensors(
    sink: IO[bytes] | RawIOBase,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    metadata: Mapping[str, str],
    data: Iterable[npt.NDArray[Any]],
) -> None:
    """Writes tensors of these dtypes (safetensors' names) and shapes; `data` are theirs, one after another, in pieces.

    Names whose items are larger come first, so that all are aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * np.dtype(_NUMPY[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    sink.write(len(text).to_bytes(8, "little") + text)
    for piece in data:
        if piece.size:
            sink.write(np.ascontiguousarray(piece).data)


def view_tensors(data: pa.Buffer) -> StoredTensors:
    """All tensors of a file, without copying. Raises `ValueError`, whatever the bytes are."""
    file = memoryview(data)
    start = 8 + int.from_bytes(file[:8], "little")
    if not 8 < start <= min(len(file), 8 + _HEADER_BYTES):
        raise ValueError(f"it has {len(file)} bytes and no safetensors header of at most {_HEADER_BYTES}")
    if start % _ALIGNED:
        raise ValueError("its data are not aligned")
    arrays, dtypes = {}, {}
    try:
        with _header_file(file[:start], len(file)) as path, safe_open(path, framework="np") as header:
            metadata = header.metadata() or {}
            for name in header.offset_keys():  # in the order of their data, which lie side by side and fill the file
                described = header.get_slice(name)
                dtype, shape = described.get_dtype(), described.get_shape()
                if dtype not in _NUMPY:
                    raise ValueError(f"it has a tensor of {dtype}")
                count = math.prod(shape)
                array = np.frombuffer(file, _NUMPY[dtype], count, start) if count else np.empty(0, _NUMPY[dtype])
                array.flags.writeable = False  # a mapped file must not be written to
                arrays[name], dtypes[name] = array.reshape(shape), dtype
                start += array.nbytes
    except SafetensorError as error:
        raise ValueError(f"it is not a safetensors file: {error}") from None
    return StoredTensors(arrays, dtypes, metadata)


@contextmanager
def _header_file(header: memoryview, size: int) -> Iterator[str]:
    """A file in memory with a header and, where its data would be, a hole: the library reads files, and only headers.

    What it could read under the stored file's name need not be what was verified, and in an object store there is none.
    """
    file = os.memfd_create("header")
    try:
        os.write(file, header)
        os.truncate(file, size)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)
