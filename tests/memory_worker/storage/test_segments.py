"""Segments come back bit for bit, and what is no segment is refused with an error of ours."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load, save

from benchmarks.support.stored_memories import SHAPE, in_little_memory, random_slots
from cluster.storage.durable import DamagedFile
from memory_worker.errors import DamagedMemory
from memory_worker.manifest import MemoryShape
from memory_worker.storage.segments import SEGMENT_FORMAT, Segment, as_torch, write_slots
from memory_worker.storage.store import MemoryStore


def segment_bytes(shape: MemoryShape, slots: int) -> bytes:
    sink = io.BytesIO()
    write_slots(sink, shape, [random_slots(shape, slots, 7)])
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
    parts = [(keys[:, :, :16], values[:, :, :16]), (keys[:, :, 16:], values[:, :, 16:])][: 1 + (slots > 16)]
    read = store.read_segment(store.write_segment("t/m/v/segments/d.safetensors", shape, parts))
    assert (read.shape, read.slots) == (shape, slots)
    assert all(map(same_bits, read.tensors(), (keys, values)))
    for chunk in read.chunks(2**20):
        assert chunk.shape == (2, shape.layers, slots, shape.kv_heads, shape.head_dim)
        assert same_bits(as_torch(chunk, dtype)[0].transpose(1, 2), keys)
        assert same_bits(as_torch(chunk, dtype)[1].transpose(1, 2), values)


def test_other_programs_can_read_it() -> None:
    keys, values = random_slots(SHAPE, 40, 7)
    found = load(segment_bytes(SHAPE, 40))
    assert sorted(found) == ["keys", "values"]
    assert same_bits(found["keys"], keys.transpose(1, 2)) and same_bits(found["values"], values.transpose(1, 2))


def test_parts_make_the_same_file_as_the_whole(tmp_path: Path) -> None:
    keys, values = random_slots(SHAPE, 40, 1)
    store = MemoryStore(str(tmp_path))
    whole = store.write_segment("whole.safetensors", SHAPE, [(keys, values)])
    cut = [(keys[:, :, a:b], values[:, :, a:b]) for a, b in ((0, 1), (1, 30), (30, 40))]
    assert store.write_segment("cut.safetensors", SHAPE, cut).digest == whole.digest


def test_chunks_are_within_the_bound() -> None:
    segment = Segment(pa.py_buffer(segment_bytes(SHAPE, 90)), "x")
    assert [c.shape[2] for c in segment.chunks(33 * SHAPE.slot_bytes + 1)] == [33, 33, 24]
    assert [c.shape[2] for c in segment.chunks(1)] == [1] * 90
    assert all(chunk.flags.c_contiguous for chunk in segment.chunks(33 * SHAPE.slot_bytes))
    whole = np.concatenate(list(segment.chunks(1)), axis=2)
    assert np.array_equal(whole, next(segment.chunks(2**30)))


@pytest.mark.parametrize("slots", [40, 20_000], ids=["read", "mapped"])
def test_a_segment_is_a_view_of_the_file(tmp_path: Path, slots: int) -> None:
    store = MemoryStore(str(tmp_path))
    file = store.write_segment("s.safetensors", SHAPE, [random_slots(SHAPE, slots, 1)])
    data = store.storage.read(file)
    read = Segment(data, "s")
    (chunk,) = read.chunks(2**30)
    begin = np.frombuffer(data, np.uint8).ctypes.data
    assert begin < chunk.ctypes.data and chunk.ctypes.data + chunk.nbytes == begin + file.size, (
        "not even a chunk copies"
    )
    assert not chunk.flags.owndata and not chunk.flags.writeable


@pytest.mark.parametrize(
    "keys", [torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 7).bfloat16(), torch.zeros(2, 2, 4, 8).bfloat16()]
)
def test_the_writer_refuses_other_shapes(keys: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not bfloat16"):
        write_slots(io.BytesIO(), SHAPE, [(keys, keys)])


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    store = MemoryStore(str(tmp_path))
    keys, values = random_slots(SHAPE, 40, 1)
    with pytest.raises(NotImplementedError, match="meta"):
        store.write_segment("s.safetensors", SHAPE, [(keys, values), (keys, values.to("meta"))])
    assert store.storage.files("") == []


def made_file(format: str | None = SEGMENT_FORMAT, **tensors: torch.Tensor) -> bytes:
    return save({name: tensor.clone() for name, tensor in tensors.items()}, {"format": format} if format else None)


SLOT = torch.zeros(3, 1, 2, 8, dtype=torch.bfloat16)
GOOD = made_file(keys=SLOT, values=SLOT)
HEADER = 8 + int.from_bytes(GOOD[:8], "little")


def with_header(**tensors: tuple[str, list[int], int, int]) -> bytes:
    """The good file with another header: dtype, shape, and where the tensor's data begin and end."""
    described: dict[str, object] = {"__metadata__": {"format": SEGMENT_FORMAT}}
    described |= {n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, (d, s, a, b) in tensors.items()}
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + GOOD[HEADER:]


def test_the_good_file_is_good() -> None:
    assert Segment(pa.py_buffer(GOOD), "good").slots == 1
    keys, values = ("BF16", [3, 1, 2, 8], 0, 96), ("BF16", [3, 1, 2, 8], 96, 192)
    assert Segment(pa.py_buffer(with_header(keys=keys, values=values)), "good").slots == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no safetensors header"),
        (b"ARROW1\0\0" + bytes(1000), "no safetensors header"),
        (GOOD[:-1], "not a safetensors file"),
        (GOOD + b"\0", "not a safetensors file"),
        ((1 << 63).to_bytes(8, "little") + GOOD[8:], "no safetensors header"),
        ((1 << 17).to_bytes(8, "little") + b" " * (1 << 17), "no safetensors header"),
        ((HEADER + 1).to_bytes(8, "little") + b" " * 1000, "not aligned"),
        (made_file(keys=SLOT, values=SLOT, format=None), "has the format None"),
        (made_file(keys=SLOT, values=SLOT, format="memorag-segment-1"), "has the format"),
        (made_file(keys=SLOT), "not keys and values"),
        (made_file(keys=SLOT, values=SLOT, more=SLOT), "not keys and values"),
        (made_file(keys=SLOT, values=SLOT.to(torch.float16)), "not keys and values"),
        (made_file(keys=SLOT.int(), values=SLOT.int()), "not keys and values"),
        (made_file(keys=SLOT.double(), values=SLOT.double()), "a tensor of F64"),
        (made_file(keys=SLOT, values=SLOT[:2]), "no slots of one shape"),
        (made_file(keys=SLOT[0], values=SLOT[0]), "no slots of one shape"),
        (made_file(keys=SLOT[:, :0], values=SLOT[:, :0]), "has (keys|the tensors)"),
        (made_file(keys=SLOT[:0], values=SLOT[:0]), "has (keys|the tensors)"),
        (made_file(**dict.fromkeys(("keys", "values"), torch.zeros(1 << 20, 1, 1, 1).bfloat16())), "impossible shape"),
        (
            with_header(values=("BF16", [3, 1, 2, 8], 0, 96), keys=("BF16", [3, 1, 2, 8], 96, 192)),
            "not keys and values",
        ),
        (with_header(keys=("BF16", [3, 1, 2, 8], 0, 96), values=("BF16", [3, 1, 2, 8], 0, 96)), "not a safetensors"),
        (with_header(keys=("BF16", [3, 2, 2, 8], 0, 192), values=("BF16", [3, 2, 2, 8], 0, 192)), "not a safetensors"),
        (with_header(keys=("BF16", [3, 1, 2, 8], 0, 96), values=("BF16", [3, 1, 2, 8], 100, 196)), "not a safetensors"),
        (
            with_header(keys=("BF16", [3, 2**30, 2, 8], 0, 96), values=("BF16", [3, 1, 2, 8], 96, 192)),
            "not a safetensors",
        ),
        (
            with_header(keys=("BF16", [2**62, 4, 1, 1], 0, 0), values=("BF16", [3, 2, 2, 8], 0, 192)),
            "not a safetensors",
        ),
        (
            with_header(keys=("BF16", [-3, -1, 2, 8], 0, 96), values=("BF16", [3, 1, 2, 8], 96, 192)),
            "not a safetensors",
        ),
    ],
)
def test_what_is_no_segment_is_refused(data: bytes, reason: str) -> None:
    def open_it() -> None:
        with pytest.raises(DamagedMemory, match=reason) as caught:
            Segment(pa.py_buffer(data), "t/m/v/segments/d.safetensors")
        assert "t/m/v/segments/d.safetensors" in str(caught.value)
        assert isinstance(caught.value, DamagedFile)

    open_it()
    assert in_little_memory(open_it)


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
