"""Segments come back bit for bit, and what is no segment is refused with an error of ours."""

import io
import random
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.support.stored_memories import SHAPE, in_little_memory, random_slots
from cluster.storage.durable import DamagedFile
from memory_worker.errors import DamagedMemory
from memory_worker.storage.manifest import MemoryShape
from memory_worker.storage.segments import Segment, SegmentWriter, as_torch
from memory_worker.storage.store import MemoryStore


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


def arrow_file(
    schema: pa.Schema, *columns: list, metadata: dict | None = None, batches: int = 1, **options: object
) -> bytes:
    sink = io.BytesIO()
    arrays = [c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for _ in range(batches):
            writer.write_batch(batch, custom_metadata=metadata)
    return sink.getvalue()


def schema_of(**metadata: str) -> pa.Schema:
    good = {"format": "memorag-segment-1", "layers": "3", "kv_heads": "2", "head_dim": "8", "dtype": "bfloat16"}
    fields = [("slots", pa.int64()), ("keys", pa.large_binary()), ("values", pa.large_binary())]
    return pa.schema([pa.field(n, t, nullable=False) for n, t in fields], metadata=good | metadata)


WINDOW = bytes(SHAPE.slot_bytes // 2)
ROW = [1], [WINDOW], [WINDOW]
NAMES = pa.array(["a"]).dictionary_encode()
OLD = pa.ipc.MetadataVersion.V4


def with_blocks(*changed: tuple[int, tuple[int, int, int]]) -> bytes:
    """A file of two windows whose footer says something else: to which of its blocks offset, head and body are added.

    A block is where the footer says that a record batch lies: offset, bytes of its head, bytes of its body.
    """
    data = bytearray(arrow_file(schema_of(), *ROW, batches=2))
    messages = [m.start() for m in re.finditer(rb"\xff{4}", data) if m.start() % 8 == 0]  # schema, two windows, the end
    heads = [8 + struct.unpack_from("<i", data, place + 4)[0] for place in messages]
    blocks = [(messages[n], heads[n], messages[n + 1] - messages[n] - heads[n]) for n in (1, 2)]
    places = [data.index(struct.pack("<qi4xq", *block)) for block in blocks]
    for number, added in changed:
        block = (old + new for old, new in zip(blocks[number], added, strict=True))
        struct.pack_into("<qi4xq", data, places[number], *block)
    return bytes(data)


SPAN = len(arrow_file(schema_of(), *ROW, batches=2)) - len(arrow_file(schema_of(), *ROW)) - 24  # from window to window


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
        *((arrow_file(schema_of(), *ROW[:n], [None], *ROW[n + 1 :]), "is null") for n in range(3)),
        (arrow_file(schema_of(), *ROW, compression="zstd"), "compressed"),
        (arrow_file(schema_of(), *ROW, compression="lz4"), "compressed"),
        (arrow_file(schema_of(), *ROW, metadata={"ARROW:experimental_compression": "zstd"}), "compressed"),
        (arrow_file(schema_of(), *ROW, metadata_version=OLD), "not a record batch of the present format"),
        (arrow_file(pa.schema([("x", NAMES.type)]), NAMES), "dictionaries"),
        (with_blocks((1, (-SPAN, 0, 0))), "outside the file, or within another"),
        (with_blocks((0, (SPAN, 0, 0))), "outside the file, or within another"),
        (with_blocks((1, (0, 0, SPAN))), "outside the file"),
        (with_blocks((1, (0, 1 << 30, 0))), "outside the file"),
        (with_blocks((0, (0, 0, -8))), "another length than its footer says"),
        (with_blocks((0, (0, -8, 8))), "another length than its footer says"),
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


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_bomb_does_not_go_off(codec: str) -> None:
    """Two times 512 MiB of zeros, which compressed are some kilobytes or megabytes."""
    zeros = pa.py_buffer(np.zeros(512 << 20, np.uint8))
    offsets = pa.py_buffer(np.array([0, zeros.size], np.int64))
    part = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, zeros])
    bomb = arrow_file(schema_of(), [zeros.size // len(WINDOW)], part, part, compression=codec)
    assert len(bomb) < 8 << 20
    del zeros, part

    def open_it() -> None:
        with pytest.raises(DamagedMemory, match="compressed"):
            Segment(pa.py_buffer(bomb), "bomb")

    assert in_little_memory(open_it)


def test_keys_and_values_that_are_the_same_bytes_are_refused() -> None:
    """Else a file could become slots of nearly twice its size."""
    window = WINDOW * 100
    data = bytearray(arrow_file(schema_of(), [100], [window], [b""]))
    # The message lists its buffers: validity and data of slots; validity, offsets and data of keys, and of values.
    keys = data.index(struct.pack("<q", len(window))) - 8 - 16  # where offsets, then data lie: two numbers each
    data[keys + 48 : keys + 80] = data[keys : keys + 32]
    with pytest.raises(DamagedMemory, match="claims 100 slots"):
        Segment(pa.py_buffer(bytes(data)), "twice")
