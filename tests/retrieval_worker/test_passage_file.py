"""What is in a passage file comes back exactly; what is not a passage file is refused, whatever its bytes."""

import hashlib
import json
import random

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load, save

from benchmarks.support.stored_memories import in_little_memory
from cluster.storage.durable import Storage, StoredFile
from retrieval_worker.errors import DamagedIndex
from retrieval_worker.passage_file import Piece, parse_passages, read_passages
from tests.support.passage_files import buffer, described, made_vectors, write_made

PATH = "t/m/v/passages/d.safetensors"
METADATA = {"format": "2", "embedder": "made-up:64", "source": "5" * 64}


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


def arrays_of(storage, file) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in load(bytes(buffer(storage, file))).items()}


def parse(data: bytes, sparse: bool = False):
    return parse_passages(pa.py_buffer(data), PATH, described(sparse))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("count", [0, 1, 700])
def test_what_is_written_is_read(storage, sparse, count):
    file = write_made(storage, PATH, count, sparse)
    held = read_passages(storage, file, described(sparse))
    vectors = made_vectors(count, sparse)
    assert len(held.passages) == count and held.source == "5" * 64 and held.bytes >= vectors.dense.nbytes
    assert held.vectors.dense.dtype == np.float16 and np.array_equal(held.vectors.dense, vectors.dense)
    if count:
        assert held.passages[count - 1] == Piece(
            20 * count - 20, 20 * count - 20 + len(f"é😀 {count - 1}"), f"é😀 {count - 1}", 3
        )
    if vectors.sparse is None:
        assert held.vectors.sparse is None
    else:
        for name in ("offsets", "tokens", "weights"):
            assert np.array_equal(getattr(held.vectors.sparse, name), getattr(vectors.sparse, name))


def test_other_programs_can_read_it(storage):
    data = bytes(buffer(storage, write_made(storage, PATH, 5, sparse=True)))
    arrays = load(data)
    assert {name: (array.dtype, array.shape) for name, array in arrays.items() if "sparse_" not in name} == {
        **dict.fromkeys(("start", "end"), (np.int64, (5,))),
        "text_offsets": (np.int64, (6,)),
        "tokens": (np.int32, (5,)),
        "dense": (np.float16, (5, 64)),
        "text": (np.uint8, (5 * len("é😀 0".encode()),)),
    }
    assert len(arrays) == 9 and arrays["text"].tobytes().decode() == "".join(f"é😀 {i}" for i in range(5))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == METADATA | {
        "data": hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    }


def test_the_same_passages_are_the_same_bytes(storage):
    first, second = (write_made(storage, f"t/m/v/passages/{name}.safetensors", 50, sparse=True) for name in "ab")
    assert first.digest == second.digest


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_file_that_is_not_its_record_is_named(storage, harm):
    file = write_made(storage, PATH, 20)
    place = storage.root + "/" + PATH
    data = bytearray(buffer(storage, file))
    data[len(data) // 2] ^= 1
    if harm == "delete":
        storage.delete_folder("t/m/v")
    else:
        with open(place, "wb") as changed:  # noqa: PTH123
            changed.write(data if harm == "flip" else data[:-100])
    with pytest.raises(
        DamagedIndex, match=r"t/m/v/passages/d\.safetensors.*made again from the document's text"
    ) as caught:
        read_passages(storage, file, described())
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    ("embedder", "reason"),
    [
        (described(model="other"), "its embedder is made-up:64, not other:64"),
        (described(dimension=32), "its embedder is made-up:64, not made-up:32"),
        (described(sparse=True), "not the tensors"),
    ],
)
def test_a_file_by_another_embedder_says_so(storage, embedder, reason):
    file = write_made(storage, PATH, 5)
    with pytest.raises(DamagedIndex, match=reason):
        read_passages(storage, file, embedder)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_changed_byte_of_a_file_without_a_record_is_noticed(storage, sparse):
    whole = bytes(buffer(storage, write_made(storage, PATH, 3, sparse)))
    assert len(parse_passages(pa.py_buffer(whole), PATH, described(sparse), found=True).passages) == 3
    for place in range(8 + int.from_bytes(whole[:8], "little"), len(whole)):
        bad = bytearray(whole)
        bad[place] ^= 1
        with pytest.raises(DamagedIndex):
            parse_passages(pa.py_buffer(bytes(bad)), PATH, described(sparse), found=True)


def test_where_the_checkpoint_lies_does_not_matter(storage):
    file = write_made(storage, PATH, 5)
    assert len(read_passages(storage, file, described(model="/models/made-up/")).passages) == 5


def _set(name, *values):
    """Changes the first items of a tensor."""

    def harm(arrays):
        array = arrays[name].reshape(-1)
        array[: len(values)] = values

    return harm


def _replace(**changed):
    return lambda arrays: arrays.update({name: change(arrays[name]) for name, change in changed.items()})


def _is_none(arrays):
    del arrays["tokens"]


HUGE = 2**63 - 1
HARMS = {
    "negative start": (_set("start", -1), "impossible offsets"),
    "end before start": (_set("end", -5), "impossible offsets"),
    "far away": (_set("end", 2**62), "as long as"),
    "no end": (_set("end", 0), "impossible offsets"),
    "negative tokens": (_set("tokens", 1, -5), "impossible offsets or tokens"),
    "text too short": (_replace(text=lambda a: a[:-1], text_offsets=lambda a: a - [0, 0, 1]), "as long as"),
    "text left over": (_replace(text=lambda a: np.append(a, a)), "outside their tensor"),
    "text ends beyond": (_set("text_offsets", 0, 8, 1000), "outside their tensor"),
    "text begins late": (_set("text_offsets", 3), "outside their tensor"),
    "texts one within another": (_set("text_offsets", 0, 17), "within another"),
    "texts wrap around": (_set("text_offsets", 0, HUGE), "within another"),
    "text without a character": (_set("text_offsets", 0, 0), "as long as"),
    "text begins within a character": (_set("text_offsets", 0, 3), "utf-8"),
    "not utf-8": (_set("text", 0xFF), "utf-8"),
    "text in rows": (_replace(text=lambda a: a.reshape(2, -1)), "its text has the shape"),
    "nan": (_set("dense", np.nan), "not finite"),
    "infinity": (_set("dense", -np.inf), "not finite"),
    "infinite weight": (_set("sparse_weights", np.inf), "not finite"),
    "more weights": (_replace(sparse_weights=lambda a: np.append(a, a)), "its sparse_weights has the shape"),
    "sparse rows beyond": (_set("sparse_offsets", 0, 5, 1000), "outside their tensor"),
    "sparse rows one within another": (_set("sparse_offsets", 0, -1), "within another"),
    "other dimension": (_replace(dense=lambda a: a[:, :32]), "its dense has the shape"),
    "a number": (_replace(dense=lambda a: a[0, 0].reshape(())), "has the shape"),
    "fewer vectors": (_replace(dense=lambda a: a[:1]), "has the shape"),
    "other type": (_replace(dense=lambda a: a.astype(np.float32)), "not the tensors"),
    "unknown type": (_replace(dense=lambda a: a.astype(np.float64)), "tensor of F64"),
    "a tensor less": (_is_none, "not the tensors"),
    "a tensor more": (lambda arrays: arrays.update(x=np.zeros(2, np.int64)), "not the tensors"),
}


@pytest.mark.parametrize("name", HARMS)
def test_contents_that_no_retriever_writes_are_refused(storage, name):
    harm, reason = HARMS[name]
    arrays = arrays_of(storage, write_made(storage, PATH, 2, sparse=True))
    assert len(parse(save(arrays, METADATA), True).passages) == 2  # unharmed, this way is fine
    harm(arrays)
    with pytest.raises(DamagedIndex, match=reason):
        parse(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, METADATA), True)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "its format is None"),
        ({"embedder": "made-up:64"}, "its format is None"),
        (METADATA | {"format": "9"}, "its format is 9"),
        (METADATA | {"embedder": "é"}, "its embedder is é"),
    ],
)
def test_other_metadata_are_refused(storage, metadata, reason):
    with pytest.raises(DamagedIndex, match=reason):
        parse(save(arrays_of(storage, write_made(storage, PATH, 2)), metadata))


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F16") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        bytes(8),
        bytes(1000),
        b"PAR1" * 3,
        b"PAR1\xff\xff\xff\x7fPAR1",
        (1 << 63).to_bytes(8, "little") + b"{}",
        with_header(b"{}      "),
        with_header(b"null    "),
        with_header(b"[]      "),
        with_header(b"\xff" * 8),
        with_header(b'{"a":' * 1000),
        with_header(b" " * (1 << 17) + b"{}      "),  # a header of any size would be read into memory
        with_header(b"{}", bytes(64)),
        with_header(json.dumps({"dense": tensor([2**40, 2**40], 0, 64)}).encode().ljust(80), bytes(64)),
        with_header(json.dumps({"dense": tensor([-4, -8], 0, 64)}).encode().ljust(80), bytes(64)),
        with_header(json.dumps({"dense": tensor([1, 64], 0, 128)}).encode().ljust(80), bytes(64)),
        with_header(json.dumps({"dense": tensor([1, 16], 0, 32)}).encode().ljust(80), bytes(64)),
        with_header(json.dumps({"dense": tensor([1, 16], 32, 64)}).encode().ljust(80), bytes(64)),
        with_header(
            json.dumps({"dense": tensor([1, 32], 0, 64), "x": tensor([1, 32], 0, 64)}).encode().ljust(160), bytes(64)
        ),
        with_header(json.dumps({"dense": tensor([1, 32], 0, 64)}).encode().ljust(81), bytes(64)),
    ],
)
def test_no_such_file_at_all_is_refused(data):
    def read() -> None:
        with pytest.raises(DamagedIndex, match=r"d\.safetensors"):
            parse(data)

    read()
    assert in_little_memory(read)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_random_bytes_in_it_are_refused_or_harmless(storage, sparse):
    whole = bytes(buffer(storage, write_made(storage, PATH, 12, sparse)))
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(11)
    refused = 0
    for turn in range(600):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3, 20])):
            # Half of them in the header, which says how the rest is read.
            place = chance.randrange(header) if turn % 2 else chance.randrange(len(data))
            data[place] = chance.choice([data[place] ^ (1 << chance.randrange(8)), chance.randrange(256), 0, 255])
        if turn % 10 == 0:
            del data[chance.randrange(len(data)) :]
        try:
            held = parse(bytes(data), sparse)
        except DamagedIndex:
            refused += 1
            continue
        for row in range(len(held.passages)):
            piece = held.passages[row]
            assert len(piece.text) == piece.end - piece.start > 0
        assert list(held.passages.texts()) == [held.passages[row].text for row in range(len(held.passages))]
        assert held.vectors.dense.shape == (len(held.passages), 64) and np.isfinite(held.vectors.dense).all()
        assert held.bytes <= len(data)
    assert refused > 200


def test_it_holds_no_more_of_storage_once_it_is_read(storage):
    file = write_made(storage, PATH, 10_000)
    assert file.size > 1 << 20, "storage would not map it"
    held = read_passages(storage, file, described())
    with open(storage.root + "/" + PATH, "r+b") as stream:  # noqa: PTH123
        stream.write(bytes(file.size))
    assert np.array_equal(held.vectors.dense, made_vectors(10_000).dense)
    assert held.passages[9999].text == "é😀 9999"


def test_the_record_is_the_files(storage):
    file = write_made(storage, PATH, 20)
    assert isinstance(file, StoredFile) and storage.record(PATH) == file
