"""The vectors of passages as they are stored and indexed: contents of a passage file, parts of a FAISS index."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from retrieval_worker.messages import EmbedderDescription, Embeddings


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Token weights of passages: those of passage `i` are at `offsets[i]` to `offsets[i + 1]`."""

    offsets: np.ndarray  # int64 [passages + 1], from 0
    tokens: np.ndarray  # int32 [weights]
    weights: np.ndarray  # float32 [weights]

    @classmethod
    def of(cls, rows: Sequence[dict[int, float]]) -> "SparseRows":
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        tokens = np.fromiter(chain.from_iterable(rows), np.int32, offsets[-1])
        weights = np.fromiter(chain.from_iterable(row.values() for row in rows), np.float32, offsets[-1])
        return cls(offsets, tokens, weights)

    @classmethod
    def join(cls, parts: Sequence["SparseRows"]) -> "SparseRows":
        """All rows, one part after another."""
        if not parts:
            return cls.of([])
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.weights for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class PassageVectors:
    """One row per passage. In fp16: the precision of the exact FAISS index."""

    dense: np.ndarray  # float16 [passages, dimension]
    sparse: SparseRows | None  # where the embedder has such

    @property
    def finite(self) -> bool:
        """Whether all values are numbers that can be compared."""
        exponents = self.dense.view(np.uint16) & 0x7C00  # all ones in what is not finite; faster than `np.isfinite`
        weights = np.empty(0) if self.sparse is None else self.sparse.weights
        return bool((exponents != 0x7C00).all() and np.isfinite(weights).all())

    @property
    def bytes(self) -> int:
        sparse = self.sparse
        return self.dense.nbytes + (
            0 if sparse is None else sparse.offsets.nbytes + sparse.tokens.nbytes + sparse.weights.nbytes
        )

    @classmethod
    def of(cls, embeddings: Embeddings) -> "PassageVectors":
        sparse = None if embeddings.sparse is None else SparseRows.of(embeddings.sparse)
        return cls(embeddings.dense.astype(np.float16), sparse)

    @classmethod
    def join(cls, parts: Sequence["PassageVectors"], embedder: EmbedderDescription) -> "PassageVectors":
        """All rows of parts that `embedder` made, one part after another."""
        dense = [np.empty((0, embedder.dimension), np.float16), *(part.dense for part in parts)]
        sparse = [part.sparse for part in parts if part.sparse is not None]
        return cls(np.concatenate(dense), SparseRows.join(sparse) if embedder.has_sparse else None)
