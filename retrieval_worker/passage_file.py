"""One document's passages and their vectors, in one Parquet file: written and read by the Retriever.

A file may come from anywhere (an imported archive has digests that match), so all that is read from it is checked.
Nothing in it is compressed or coded: it is as large as what it holds, and reading it takes no more memory than that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage.durable import DamagedFile, Storage, StoredFile
from retrieval_worker.errors import DamagedIndex
from retrieval_worker.messages import EmbedderDescription
from retrieval_worker.parquet_footer import column_codings
from retrieval_worker.vectors import PassageVectors, SparseRows

_FORMAT = "1"
_UNCOMPRESSED = 0
_CODINGS = {0, 3}  # Parquet's PLAIN and RLE, for values and for list lengths; all others can make much of few bytes
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """A passage as its file knows it: `text` is exactly the document's characters `start` to `end`."""

    start: int
    end: int
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class PassageTexts:
    """Everything of a document's passages but the vectors."""

    texts: Any  # pa.LargeStringArray
    starts: np.ndarray  # int64 [passages]
    ends: np.ndarray
    tokens: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> Piece:
        return Piece(int(self.starts[row]), int(self.ends[row]), self.texts[row].as_py(), int(self.tokens[row]))


@dataclass(frozen=True, slots=True)
class PassageFile:
    """What one file holds, checked."""

    source: str  # digest of the text that the passages were cut from
    passages: PassageTexts
    vectors: PassageVectors
    bytes: int


def write_passages(
    storage: Storage,
    path: str,
    pieces: Sequence[Piece],
    vectors: PassageVectors,
    *,
    source: StoredFile,
    embedder: EmbedderDescription,
) -> StoredFile:
    """Writes the passages of the text `source`, one row each, as the file `path`."""
    schema = _schema(embedder, source.digest)
    columns: list[Any] = [
        pa.array([piece.text for piece in pieces], pa.large_string()),
        pa.array([piece.start for piece in pieces], pa.int64()),
        pa.array([piece.end for piece in pieces], pa.int64()),
        pa.array([piece.tokens for piece in pieces], pa.int32()),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.dense.reshape(-1)), type=schema.field("dense").type),
    ]
    if vectors.sparse is not None:
        offsets = pa.array(vectors.sparse.offsets, pa.int32())
        for name, values in (("sparse_tokens", vectors.sparse.tokens), ("sparse_weights", vectors.sparse.weights)):
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(values), type=schema.field(name).type))
    with storage.writer(path) as sink:
        pq.write_table(
            pa.Table.from_arrays(columns, schema=schema),
            sink,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
    return sink.stored


def read_passages(storage: Storage, file: StoredFile, embedder: EmbedderDescription) -> PassageFile:
    """Raises `DamagedIndex` where the file is not what its record says, or not one that `embedder` can search."""
    try:
        data = storage.read(file)
    except DamagedFile as error:
        raise DamagedIndex(file.path, error.reason) from error
    return parse_passages(data, file.path, embedder)


def parse_passages(data: Any, path: str, embedder: EmbedderDescription) -> PassageFile:
    """What `data`, a `pa.Buffer` read from `path`, holds. Raises `DamagedIndex`, whatever the bytes are."""
    try:
        codings = column_codings(memoryview(data))
        if any(codec != _UNCOMPRESSED or not encodings <= _CODINGS for codec, encodings in codings):
            raise ValueError("it has a column that is compressed or coded")
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        _check_header(file, data.size, embedder)
        held = _check(_read(file, data.size), embedder)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedIndex(path, f"cannot be read: {error}") from error
    return held


def _schema(embedder: EmbedderDescription, source: str) -> Any:
    def list_of(kind: Any, size: int = -1) -> Any:
        return pa.list_(pa.field("element", kind, nullable=False), size)

    columns = {
        "text": pa.large_string(),
        "start": pa.int64(),
        "end": pa.int64(),
        "tokens": pa.int32(),
        "dense": list_of(pa.float16(), embedder.dimension),
    }
    if embedder.has_sparse:
        columns |= {"sparse_tokens": list_of(pa.int32()), "sparse_weights": list_of(pa.float32())}
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in columns.items()],
        {
            "format": _FORMAT,
            "embedder": _fingerprint(embedder),
            "dimension": str(embedder.dimension),
            "source": source,
        },
    )


def _fingerprint(embedder: EmbedderDescription) -> str:
    """Names the vector space of an embedder wherever its checkpoint lies."""
    return f"{embedder.model.rstrip('/').rpartition('/')[2]}:{embedder.dimension}"


def _check_header(file: Any, size: int, embedder: EmbedderDescription) -> None:
    """Raises `ValueError` for a file that is not one of ours, before any of its rows are read."""
    schema, expected = file.schema_arrow, _schema(embedder, "")
    found = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    for key in ("format", "embedder", "dimension"):
        if (value := expected.metadata[key.encode()].decode()) != found.get(key):
            raise ValueError(f"its {key} is {found.get(key)}, not {value}")
    if not schema.equals(expected):
        raise ValueError("it has not the columns of a passage file")
    rows = file.metadata.num_rows
    if not 0 <= rows * embedder.dimension * 2 <= size:
        raise ValueError(f"it claims {rows} rows in {size} bytes")


def _read(file: Any, size: int) -> Any:
    """All rows as one table. Pages need not be coded as the footer says, so what they grow to is watched."""
    batches: list[Any] = []
    total = 0
    for batch in file.iter_batches(_ROWS_AT_ONCE):
        total += batch.nbytes
        if total > 2 * size:  # offsets of texts and lists take more here than in the file, but not twice as much
            raise ValueError(f"it has {size} bytes, but holds more than {total}")
        batches.append(batch)
    table = pa.Table.from_batches(batches, file.schema_arrow).combine_chunks()
    table.validate(full=True)
    return table


def _check(table: Any, embedder: EmbedderDescription) -> PassageFile:
    """The table's contents. Raises `ValueError` for such as no Retriever writes."""
    texts = _combine(table, "text")
    starts, ends, tokens = (_combine(table, name).to_numpy() for name in ("start", "end", "tokens"))
    if (starts < 0).any() or (ends <= starts).any() or (tokens < 0).any():
        raise ValueError("it has a passage with impossible offsets or tokens")
    if (pc.utf8_length(texts).to_numpy() != ends - starts).any():
        raise ValueError("it has a passage whose text is not as long as its offsets say")
    dense = _combine(table, "dense").flatten().to_numpy().reshape(-1, embedder.dimension)
    vectors = PassageVectors(dense, _check_sparse(table) if embedder.has_sparse else None)
    if not vectors.finite:
        raise ValueError("it has a vector that is not finite")
    source = table.schema.metadata.get(b"source", b"").decode()
    return PassageFile(source, PassageTexts(texts, starts, ends, tokens), vectors, table.nbytes)


def _check_sparse(table: Any) -> SparseRows:
    tokens, weights = _combine(table, "sparse_tokens"), _combine(table, "sparse_weights")
    lengths = [pc.list_value_length(column).to_numpy() for column in (tokens, weights)]
    if not np.array_equal(*lengths):
        raise ValueError("it has a passage with more sparse tokens than weights, or fewer")
    offsets = np.concatenate([[0], np.cumsum(lengths[0], dtype=np.int64)])
    return SparseRows(offsets, tokens.flatten().to_numpy(), weights.flatten().to_numpy())


def _combine(table: Any, name: str) -> Any:
    """A column as one array."""
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
