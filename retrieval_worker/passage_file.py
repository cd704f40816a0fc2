"""One document's passages and their vectors, in one safetensors file: written and read by the Retriever.

    start, end, text_offsets   I64    [passages], [passages], [passages + 1]
    tokens                     I32    [passages]
    sparse_offsets             I64    [passages + 1]; of what is sparse only where the embedder has such
    sparse_tokens              I32    [weights]
    sparse_weights             F32    [weights]
    dense                      F16    [passages, dimension]
    text                       U8     [bytes], UTF-8: passage `i` is at `text_offsets[i]` to `text_offsets[i + 1]`

A file may come from anywhere (an imported archive has digests that match), so all that is read from it is checked.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cluster.storage.durable import DamagedFile, Storage, StoredFile
from cluster.storage.tensors import view_tensors, write_tensors
from retrieval_worker.errors import DamagedIndex
from retrieval_worker.messages import EmbedderDescription
from retrieval_worker.vectors import PassageVectors, SparseRows

_FORMAT = "2"
_DTYPES = {"start": "I64", "end": "I64", "text_offsets": "I64", "sparse_offsets": "I64", "tokens": "I32"}
_DTYPES |= {"sparse_tokens": "I32", "sparse_weights": "F32", "dense": "F16", "text": "U8"}


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

    text: np.ndarray  # uint8 [bytes], UTF-8
    offsets: np.ndarray  # int64 [passages + 1], in `text`
    starts: np.ndarray  # int64 [passages]
    ends: np.ndarray
    tokens: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> Piece:
        text = self.text[self.offsets[row] : self.offsets[row + 1]].tobytes().decode()
        return Piece(int(self.starts[row]), int(self.ends[row]), text, int(self.tokens[row]))

    def texts(self) -> Iterator[str]:
        """The texts of all passages."""
        text = self.text.tobytes()
        return (text[begin:end].decode() for begin, end in pairwise(self.offsets.tolist()))

    @property
    def bytes(self) -> int:
        return sum(a.nbytes for a in (self.text, self.offsets, self.starts, self.ends, self.tokens))


@dataclass(frozen=True, slots=True)
class PassageFile:
    """What one file holds, checked: copies, which need no storage."""

    source: str  # digest of the text that the passages were cut from
    passages: PassageTexts
    vectors: PassageVectors

    @property
    def bytes(self) -> int:
        return self.passages.bytes + self.vectors.bytes


def write_passages(
    storage: Storage,
    path: str,
    pieces: Sequence[Piece],
    vectors: PassageVectors,
    *,
    source: StoredFile,
    embedder: EmbedderDescription,
) -> StoredFile:
    """Writes the passages of the text `source` as the file `path`."""
    texts = [piece.text.encode() for piece in pieces]
    arrays: dict[str, np.ndarray] = {
        "start": np.array([piece.start for piece in pieces], np.int64),
        "end": np.array([piece.end for piece in pieces], np.int64),
        "text_offsets": np.cumsum([0, *map(len, texts)], dtype=np.int64),
        "tokens": np.array([piece.tokens for piece in pieces], np.int32),
        "dense": vectors.dense,
        "text": np.frombuffer(b"".join(texts), np.uint8),
    }
    if (sparse := vectors.sparse) is not None:
        arrays |= {"sparse_offsets": sparse.offsets, "sparse_tokens": sparse.tokens, "sparse_weights": sparse.weights}
    arrays = {name: arrays[name] for name in _DTYPES if name in arrays}
    with storage.writer(path) as sink:
        write_tensors(
            sink,
            {name: (_DTYPES[name], array.shape) for name, array in arrays.items()},
            _describe(embedder) | {"source": source.digest, "data": _digest(arrays.values())},
            arrays.values(),
        )
    return sink.stored


def read_passages(
    storage: Storage, file: StoredFile, embedder: EmbedderDescription, *, found: bool = False
) -> PassageFile:
    """Raises `DamagedIndex` where the file is not what its record says, or not one that `embedder` can search.

    One that was only `found`, with no record from when it was written, is checked by the digest that is in it.
    """
    try:
        data = storage.read(file)
    except DamagedFile as error:
        raise DamagedIndex(file.path, error.reason) from error
    return parse_passages(data, file.path, embedder, found=found)


def parse_passages(data: Any, path: str, embedder: EmbedderDescription, *, found: bool = False) -> PassageFile:
    """What `data`, a `pa.Buffer` read from `path`, holds. Raises `DamagedIndex`, whatever the bytes are."""
    try:
        stored = view_tensors(data)
        for key, value in _describe(embedder).items():
            if (its := stored.metadata.get(key)) != value:
                raise ValueError(f"its {key} is {its}, not {value}")
        if stored.dtypes != {n: t for n, t in _DTYPES.items() if embedder.has_sparse or not n.startswith("sparse")}:
            raise ValueError("it has not the tensors of a passage file")
        if found and stored.metadata.get("data") != _digest(stored.arrays.values()):
            raise ValueError("its data do not match their SHA-256")
        texts, vectors = _check(stored.arrays, embedder)
    except ValueError as error:
        raise DamagedIndex(path, f"cannot be read: {error}") from error
    return PassageFile(stored.metadata.get("source", ""), texts, vectors)


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the data, one tensor after another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _describe(embedder: EmbedderDescription) -> dict[str, str]:
    """What must be the same for a file to be read; the embedder by its vector space, wherever its checkpoint lies."""
    name = f"{embedder.model.rstrip('/').rpartition('/')[2]}:{embedder.dimension}"
    return {"format": _FORMAT, "embedder": name}


def _check(arrays: dict[str, np.ndarray], embedder: EmbedderDescription) -> tuple[PassageTexts, PassageVectors]:
    """Copies of the tensors. Raises `ValueError` for such as no Retriever writes."""
    count = arrays["dense"].shape[0] if arrays["dense"].ndim else 0
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("start", "end", "tokens"), (count,))
    shapes |= dict.fromkeys(("text_offsets", "sparse_offsets"), (count + 1,))
    shapes |= {"dense": (count, embedder.dimension), "text": (arrays["text"].size,)}
    if embedder.has_sparse:
        shapes |= dict.fromkeys(("sparse_tokens", "sparse_weights"), (arrays["sparse_tokens"].size,))
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise ValueError(f"its {name} has the shape {array.shape}, not {shapes[name]}")
    copies = {name: array.copy() for name, array in arrays.items()}
    texts = PassageTexts(*(copies[name] for name in ("text", "text_offsets", "start", "end", "tokens")))
    _check_texts(texts)
    sparse = None
    if embedder.has_sparse:
        sparse = SparseRows(*(copies[name] for name in ("sparse_offsets", "sparse_tokens", "sparse_weights")))
        _check_offsets(sparse.offsets, len(sparse.tokens))
    vectors = PassageVectors(copies["dense"], sparse)
    if not vectors.finite:
        raise ValueError("it has a vector that is not finite")
    return texts, vectors


def _check_texts(texts: PassageTexts) -> None:
    if (texts.starts < 0).any() or (texts.ends <= texts.starts).any() or (texts.tokens < 0).any():
        raise ValueError("it has a passage with impossible offsets or tokens")
    _check_offsets(texts.offsets, len(texts.text))
    lengths = np.fromiter(map(len, texts.texts()), np.int64, len(texts))  # which decodes them; else a `ValueError`
    if (lengths != texts.ends - texts.starts).any():
        raise ValueError("it has a passage whose text is not as long as its offsets say")


def _check_offsets(offsets: np.ndarray, end: int) -> None:
    """Raises `ValueError` unless the rows that begin and end there are all of an array with so many items."""
    if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("it has rows that lie outside their tensor, or within another")
