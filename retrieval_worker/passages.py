"""Texts into passages, and passages to and from their Parquet file: used by the Retriever.

A passage is a slice of its document: offsets count Unicode code points and map back exactly.
"""

import io
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage, StoredFile
from retrieval_worker.messages import Passage

# The splitter takes quadratic time where a text has no boundaries, so it is given no more than this at once.
_SLAB_CHARACTERS = 16_384
_SLAB_ENDS = ("\n\n", "\n", "。", ". ", " ")

_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("document", pa.string()),
        ("text", pa.large_string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("tokens", pa.int32()),
    ]
)


def cut(text: str, max_characters: int, overlap_characters: int = 0) -> list[tuple[int, int]]:
    """Cuts `text` at paragraphs, lines, sentences or words, the largest that fit, into slices in order.

    Each slice `(start, end)` has at most `max_characters` characters and neither begins nor ends with white
    space; all that lies outside of them is white space. Neighbours share up to `overlap_characters`.
    """
    from semantic_text_splitter import TextSplitter

    splitter = TextSplitter(max_characters, overlap=min(overlap_characters, max_characters - 1))
    slices = []
    for begin, end in _slabs(text, max(_SLAB_CHARACTERS, 4 * max_characters)):
        for offset, chunk in splitter.chunk_indices(text[begin:end]):
            if chunk.strip():
                slices.append((begin + offset, begin + offset + len(chunk)))
    return slices


def write_passages(storage: Storage, path: str, passages: Sequence[Passage], embedder: str) -> StoredFile:
    """Writes the Parquet file; `embedder` names the model whose vectors the index beside it holds."""
    columns = {name: [getattr(passage, name) for passage in passages] for name in _SCHEMA.names}
    table = pa.table(columns, schema=_SCHEMA.with_metadata({"embedder": embedder}))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return storage.write(path, sink.getvalue())


_CACHED_PASSAGES = 4096  # the same few are found again and again; Arrow takes a while to make one


class PassageFile(Sequence[Passage]):
    """The passages of one index by id, read from its Parquet file. Raises `DamagedFile` when it is not intact."""

    def __init__(self, storage: Storage, file: StoredFile) -> None:
        self._table = pq.read_table(pa.BufferReader(storage.read(file))).combine_chunks()
        self._passage = lru_cache(_CACHED_PASSAGES)(self._read)

    @property
    def embedder(self) -> str:
        """The model whose vectors the index holds."""
        return (self._table.schema.metadata or {}).get(b"embedder", b"").decode()

    @cached_property
    def texts(self) -> list[str]:
        return self._table["text"].to_pylist()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [Passage(**values) for values in self._table[row].to_pylist()]
        if not 0 <= row < len(self):
            raise IndexError(f"no passage {row}: there are {len(self)}")
        return self._passage(row)

    def _read(self, row: int) -> Passage:
        return Passage(**{name: self._table[name][row].as_py() for name in _SCHEMA.names})


def _slabs(text: str, size: int) -> Iterator[tuple[int, int]]:
    """Slices that cover `text`, each at most `size` long and ending at the best boundary of its second half."""
    start = 0
    while len(text) - start > size:
        middle = start + size // 2
        for mark in _SLAB_ENDS:
            found = text.rfind(mark, middle, start + size)
            if found >= 0:
                end = found + len(mark)
                break
        else:
            end = start + size
        yield start, end
        start = end
    yield start, len(text)
