"""What is in a passage file comes back exactly; what is not a passage file is refused, whatever its bytes."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage.durable import Storage, StoredFile
from retrieval_worker.errors import DamagedIndex
from retrieval_worker.passage_file import Piece, parse_passages, read_passages
from tests.support.passage_files import buffer, described, made_vectors, write_made

PATH = "t/m/v/passages/d.parquet"


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


def table_of(storage, file) -> pa.Table:
    return pq.read_table(pa.BufferReader(buffer(storage, file)))


def as_file(table: pa.Table, **options) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **({"compression": "none", "use_dictionary": False} | options))
    return sink.getvalue()


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
    file = write_made(storage, PATH, 5, sparse=True)
    table = table_of(storage, file)
    assert table.column_names == ["text", "start", "end", "tokens", "dense", "sparse_tokens", "sparse_weights"]
    assert table["dense"].type == pa.list_(pa.field("element", pa.float16(), nullable=False), 64)
    assert table.schema.metadata[b"embedder"] == b"made-up:64"


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
    with pytest.raises(DamagedIndex, match=r"t/m/v/passages/d\.parquet.*made again from the document's text") as caught:
        read_passages(storage, file, described())
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    ("embedder", "reason"),
    [
        (described(model="other"), "its embedder is made-up:64, not other:64"),
        (described(dimension=32), "its embedder is made-up:64, not made-up:32"),
        (described(sparse=True), "not the columns"),
    ],
)
def test_a_file_by_another_embedder_says_so(storage, embedder, reason):
    file = write_made(storage, PATH, 5)
    with pytest.raises(DamagedIndex, match=reason):
        read_passages(storage, file, embedder)


def test_where_the_checkpoint_lies_does_not_matter(storage):
    file = write_made(storage, PATH, 5)
    assert len(read_passages(storage, file, described(model="/models/made-up/")).passages) == 5


def _with(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    number = table.column_names.index(name)
    return table.set_column(number, table.schema.field(number), [values.cast(table.schema.field(number).type)])


def _offsets(table, starts, ends):
    return _with(_with(table, "start", pa.array(starts)), "end", pa.array(ends))


def _not_finite(table, value):
    dense = table["dense"].combine_chunks().flatten().to_numpy().copy()
    dense[70] = value
    kind = table.schema.field("dense").type
    return _with(table, "dense", pa.FixedSizeListArray.from_arrays(pa.array(dense), type=kind))


def _sparse(table, name, change):
    column = table[name].combine_chunks()
    offsets, values = column.offsets.to_numpy().copy(), column.values.to_numpy().copy()
    change(offsets, values)
    return _with(table, name, pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=column.type))


def _uneven(offsets, values):
    offsets[1] += 1


def _infinite(offsets, values):
    values[3] = np.inf


HARMS = {
    "negative start": (lambda t: _offsets(t, [-1, 20], [3, 24]), "impossible offsets"),
    "end before start": (lambda t: _offsets(t, [5, 20], [1, 24]), "impossible offsets"),
    "far away": (lambda t: _offsets(t, [0, 20], [2**62, 24]), "as long as"),
    "no end": (lambda t: _offsets(t, [0, 20], [0, 24]), "impossible offsets"),
    "text too short": (lambda t: _with(t, "text", pa.array(["a", "b"], pa.large_string())), "as long as"),
    "negative tokens": (lambda t: _with(t, "tokens", pa.array([1, -5], pa.int32())), "tokens"),
    "nan": (lambda t: _not_finite(t, np.nan), "not finite"),
    "infinity": (lambda t: _not_finite(t, -np.inf), "not finite"),
    "infinite weight": (lambda t: _sparse(t, "sparse_weights", _infinite), "not finite"),
    "uneven weights": (lambda t: _sparse(t, "sparse_weights", _uneven), "more sparse tokens"),
    "no format": (lambda t: t.replace_schema_metadata({"embedder": "made-up:64"}), "its format is None"),
    "other format": (lambda t: t.replace_schema_metadata({**t.schema.metadata, b"format": b"9"}), "its format is 9"),
    "not utf-8 there": (
        lambda t: t.replace_schema_metadata({**t.schema.metadata, b"embedder": b"\xff\xfe"}),
        "cannot be read",
    ),
    "a column less": (lambda t: t.drop_columns(["tokens"]), "columns"),
    "a column more": (lambda t: t.append_column("x", pa.array([1, 2])), "columns"),
    "nullable": (lambda t: t.cast(pa.schema([f.with_nullable(True) for f in t.schema], t.schema.metadata)), "columns"),
    "not utf-8": (
        lambda t: _with(
            t,
            "text",
            pa.LargeStringArray.from_buffers(
                2, pa.py_buffer(np.array([0, 4, 8])), pa.py_buffer(b"\xff\xfeab\xff\xfeab"), None
            ),
        ),
        "UTF8|UTF-8",
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_contents_that_no_retriever_writes_are_refused(storage, name):
    harm, reason = HARMS[name]
    table = table_of(storage, write_made(storage, PATH, 2, sparse=True))
    assert len(parse_passages(as_file(table), PATH, described(True)).passages) == 2  # unharmed, this way is fine
    with pytest.raises(DamagedIndex, match=reason):
        parse_passages(as_file(harm(table)), PATH, described(True))


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"use_dictionary": ["text"]}])
def test_what_could_grow_when_read_is_refused(storage, options):
    table = table_of(storage, write_made(storage, PATH, 2))
    with pytest.raises(DamagedIndex, match="compressed or coded"):
        parse_passages(as_file(table, **options), PATH, described())


def test_a_header_that_denies_its_coding_cannot_make_it_grow_far(storage):
    table = table_of(storage, write_made(storage, PATH, 2000))
    texts = pa.array(["x" * 100_000] * 2000, pa.large_string())
    data = bytes(as_file(_with(table, "text", texts), use_dictionary=["text"]))
    coded, plain = b"\x35\x00\x06\x10", b"\x35\x00\x06\x06"  # Thrift's list of PLAIN, RLE and RLE_DICTIONARY
    assert len(data) < 1 << 20 and data.count(coded) == 1  # it would become 200 MB
    with pytest.raises(DamagedIndex, match=r"holds more than \d{1,8};"):
        parse_passages(pa.py_buffer(data.replace(coded, plain)), PATH, described())


def test_an_unknown_codec_is_refused(storage):
    """Asking pyarrow 26 for the codec of such a column ends the process."""
    data = bytearray(buffer(storage, write_made(storage, PATH, 2)))
    codec = data.rindex(b"start\x15\x00") + 6  # its path, then its codec as a field of its own
    data[codec] = 2 * 54
    with pytest.raises(DamagedIndex, match="compressed or coded"):
        parse_passages(pa.py_buffer(bytes(data)), PATH, described())


@pytest.mark.parametrize(
    "footer",
    [
        b"",
        b"\x00",
        b"\xff" * 40,
        b"\x49" * 40,
        b"\x1c" * 40,
        b"\x49\xfc\xff\xff\xff\xff\x7f",
        b"\x15\x00\x05\x02\x00\x00",
    ],
)
def test_a_footer_that_is_none_is_refused(footer):
    data = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(DamagedIndex, match="footer"):
        parse_passages(pa.py_buffer(data), PATH, described())


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 3, bytes(1000), b"PAR1\xff\xff\xff\x7fPAR1"])
def test_no_parquet_at_all_is_refused(data):
    with pytest.raises(DamagedIndex, match=r"d\.parquet"):
        parse_passages(pa.py_buffer(data), PATH, described())


@pytest.mark.parametrize("checksums", [True, False], ids=["as written", "without page checksums"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_random_bytes_in_it_are_refused_or_harmless(storage, checksums, sparse):
    file = write_made(storage, PATH, 12, sparse)
    whole = bytes(buffer(storage, file)) if checksums else bytes(as_file(table_of(storage, file)))
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    chance = random.Random(11)
    refused = 0
    for turn in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3, 20])):
            # Half of them in the footer, which says how the rest is read.
            place = chance.randrange(len(data) - footer, len(data)) if turn % 2 else chance.randrange(len(data))
            data[place] = chance.choice([data[place] ^ (1 << chance.randrange(8)), chance.randrange(256), 0, 255])
        if turn % 10 == 0:
            del data[chance.randrange(len(data)) :]
        try:
            held = parse_passages(pa.py_buffer(bytes(data)), PATH, described(sparse))
        except DamagedIndex:
            refused += 1
            continue
        for row in range(len(held.passages)):
            piece = held.passages[row]
            assert len(piece.text) == piece.end - piece.start > 0
        assert held.vectors.dense.shape == (len(held.passages), 64) and np.isfinite(held.vectors.dense).all()
    assert refused > 100


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
