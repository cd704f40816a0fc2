"""Segments come back bit for bit, and what is no segment is refused with an error of ours."""

import io
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.storage import DamagedFile
from memory_worker.errors import DamagedMemory
from memory_worker.manifest import MemoryShape
from memory_worker.segments import Segment, SegmentWriter, as_torch
from memory_worker.store import MemoryStore
from tests.memory_worker.stored import SHAPE, random_slots


def segment_bytes(shape: MemoryShape, slots: int, *, window_slots: int = 16) -> bytes:
    sink = io.BytesIO()
    writer = SegmentWriter(sink, shape)
    writer.append(*random_slots(shape, slots, 7), window_slots=window_slots)
    writer.close()
    return sink.getvalue()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("slots", [1, 16, 40])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: str, slots: int) -> None:
    shape = SHAPE.model_copy(update={"dtype": dtype})
    bits = torch.randint(0, 256, (2, *(shape.layers, shape.kv_heads, slots), shape.slot_bytes // (6 * 2)))
    keys, values = bits.to(torch.uint8).view(getattr(torch, dtype))  # every bit pattern, NaNs included
    store = MemoryStore(str(tmp_path))
    with store.write_segment("t/m/v/segments/d.arrow", shape) as segment:
        segment.append(keys[:, :, :16], values[:, :, :16], window_slots=16)
        if slots > 16:
            segment.append(keys[:, :, 16:], values[:, :, 16:], window_slots=16)
    read = store.read_segment(segment.entry)
    assert (read.shape, read.slots) == (shape, slots)
    assert [w.slots for w in read.windows] == [16] * (slots // 16) + ([slots % 16] if slots % 16 else [])
    assert all(map(same_bits, read.tensors(), (keys, values)))
    for chunk in read.chunks(2**20):
        assert chunk.shape == (2, shape.layers, slots, shape.kv_heads, shape.head_dim)
        assert same_bits(as_torch(chunk, dtype)[0].transpose(1, 2), keys)
        assert same_bits(as_torch(chunk, dtype)[1].transpose(1, 2), values)


def test_chunks_are_whole_windows_within_the_bound() -> None:
    segment = Segment(pa.py_buffer(segment_bytes(SHAPE, 90)), "x")
    assert [c.shape[2] for c in segment.chunks(33 * SHAPE.slot_bytes)] == [32, 32, 26]
    assert [c.shape[2] for c in segment.chunks(1)] == [16] * 5 + [10]
    whole = np.concatenate(list(segment.chunks(1)), axis=2)
    assert np.array_equal(whole, next(segment.chunks(2**30)))


def test_windows_are_views_of_the_file(tmp_path: Path) -> None:
    store = MemoryStore(str(tmp_path))
    with store.write_segment("s.arrow", SHAPE) as segment:
        segment.append(*random_slots(SHAPE, 40, 1), window_slots=16)
    before = pa.total_allocated_bytes()
    read = store.read_segment(segment.entry)
    assert pa.total_allocated_bytes() - before < 40 * SHAPE.slot_bytes // 2
    assert not read.windows[0].keys.flags.owndata and not read.windows[0].keys.flags.writeable


@pytest.mark.parametrize(
    "keys", [torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 7).bfloat16(), torch.zeros(2, 2, 4, 8).bfloat16()]
)
def test_the_writer_refuses_other_shapes(keys: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not bfloat16"):
        SegmentWriter(io.BytesIO(), SHAPE).append(keys, keys)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    store = MemoryStore(str(tmp_path))
    with pytest.raises(RuntimeError), store.write_segment("s.arrow", SHAPE) as segment:
        segment.append(*random_slots(SHAPE, 40, 1))
        raise RuntimeError
    assert store.storage.files("") == []


def arrow_file(schema: pa.Schema, *columns: list) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema))
    return sink.getvalue()


def schema_of(**metadata: str) -> pa.Schema:
    good = {"format": "memorag-segment-1", "layers": "3", "kv_heads": "2", "head_dim": "8", "dtype": "bfloat16"}
    fields = [("slots", pa.int64()), ("keys", pa.large_binary()), ("values", pa.large_binary())]
    return pa.schema([pa.field(n, t, nullable=False) for n, t in fields], metadata=good | metadata)


WINDOW = bytes(SHAPE.slot_bytes // 2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a readable Arrow file"),
        (b"not an arrow file at all", "not a readable Arrow file"),
        (arrow_file(pa.schema([("x", pa.int64())]), [1]), "not a segment"),
        (arrow_file(schema_of().remove_metadata(), [1], [WINDOW], [WINDOW]), "not a segment"),
        (arrow_file(schema_of(extra="1"), [1], [WINDOW], [WINDOW]), "not a segment"),
        (arrow_file(schema_of(format="memorag-segment-9"), [1], [WINDOW], [WINDOW]), "has the format"),
        (arrow_file(schema_of(layers="-3"), [1], [WINDOW], [WINDOW]), "impossible shape"),
        (arrow_file(schema_of(layers="9" * 50), [1], [WINDOW], [WINDOW]), "impossible shape"),
        (arrow_file(schema_of(dtype="object"), [1], [WINDOW], [WINDOW]), "impossible shape"),
        (arrow_file(schema_of(), [1], [WINDOW[1:]], [WINDOW]), "bytes of keys for 1 slots"),
        (arrow_file(schema_of(), [1], [WINDOW], [WINDOW * 2]), "bytes of values for 1 slots"),
        (arrow_file(schema_of(), [2**62], [WINDOW], [WINDOW]), "bytes of keys"),
        (arrow_file(schema_of(), [0], [b""], [b""]), "bytes of keys for 0 slots"),
        (arrow_file(schema_of(), [1, 1], [WINDOW] * 2, [WINDOW] * 2), "2 rows"),
    ],
)
def test_what_is_no_segment_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DamagedMemory, match=reason) as caught:
        Segment(pa.py_buffer(data), "t/m/v/segments/d.arrow")
    assert "t/m/v/segments/d.arrow" in str(caught.value)
    assert isinstance(caught.value, DamagedFile)


def test_no_damage_crashes_the_reader() -> None:
    """Even with the digest out of the way, damaged bytes give an error of ours or a segment, never another error."""
    good = segment_bytes(SHAPE, 40)
    chance = random.Random(0)
    refused = 0
    for attempt in range(600):
        bad = bytearray(good)
        if attempt % 3 == 0:
            del bad[chance.randrange(len(bad)) :]
        else:
            for _ in range(1 + attempt % 4):
                bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        try:
            Segment(pa.py_buffer(bytes(bad)), "damaged").tensors()
        except DamagedMemory:
            refused += 1
    assert refused > 200
