"""The FAISS index of passages and their sparse weights: built in memory and searched by the Retriever."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from retrieval_worker.config import IndexConfig
from retrieval_worker.messages import EmbedderDescription, Embeddings
from retrieval_worker.vectors import PassageVectors, SparseRows

_TRAINING_VECTORS_PER_LIST = 64  # FAISS wants 39 to 256
_ROWS_AT_ONCE = 16_384  # FAISS takes float32: so many rows are widened at a time

Ranking = list[tuple[int, float]]  # passage id and score, best first


class PassageIndex:
    """Vectors and sparse weights of passages `0 … n-1`. Immutable, so that threads may search it together."""

    def __init__(self, dense: Any, sparse: "SparseWeights | None") -> None:
        self._dense = dense  # a faiss.Index
        self._sparse = sparse

    @classmethod
    def build(
        cls, parts: Sequence[PassageVectors], embedder: EmbedderDescription, config: IndexConfig
    ) -> "PassageIndex":
        """The passages of all parts, one after another, searched by what `embedder` makes of a query.

        Exact up to `config.exact_limit` passages: vectors are copied, at memory speed. Beyond, inverted lists are
        trained on a sample first, which takes minutes for millions of passages.
        """
        import faiss

        count = sum(len(part.dense) for part in parts)
        dense: Any
        if count <= config.exact_limit:
            dense = faiss.index_factory(embedder.dimension, "SQfp16", faiss.METRIC_INNER_PRODUCT)
        else:
            lists = max(1, min(int(4 * math.sqrt(count)), count // 39))
            dense = faiss.index_factory(embedder.dimension, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
            dense.nprobe = config.nprobe
            dense.train(_sample(parts, count, lists * _TRAINING_VECTORS_PER_LIST))
        for rows in _widened(parts):
            dense.add(rows)
        if config.gpu == "auto" and faiss.get_num_gpus() > 0:
            dense = _on_gpu(dense)
        if not embedder.has_sparse:
            return cls(dense, None)
        return cls(dense, SparseWeights.build([part.sparse for part in parts if part.sparse is not None]))

    @property
    def count(self) -> int:
        """Passages in it."""
        return int(self._dense.ntotal)

    def search(self, query: Embeddings, row: int, hits: int) -> list[Ranking]:
        """Rankings for text `row` of `query`: by similarity and, where there are sparse weights, by those."""
        scores, ids = self._dense.search(query.dense[row : row + 1], min(hits, max(self.count, 1)))
        found = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
        rankings = [[(passage, score) for passage, score in found if passage >= 0]]
        if self._sparse is not None and query.sparse is not None:
            rankings.append(self._sparse.search(query.sparse[row], hits))
        return rankings


class SparseWeights:
    """Learned token weights of passages, by token: a query reads the rows of its own tokens only."""

    def __init__(self, tokens: np.ndarray, postings: Any, count: int) -> None:
        self._tokens = tokens  # int32 [distinct tokens], ascending
        self._postings = postings  # scipy CSR float32 [distinct tokens, passages]
        self._count = count

    @classmethod
    def build(cls, parts: Sequence[SparseRows]) -> "SparseWeights":
        from scipy.sparse import csr_matrix

        rows = SparseRows.joined(parts)
        count = len(rows.offsets) - 1
        passages = np.repeat(np.arange(count, dtype=np.int32), np.diff(rows.offsets))
        tokens, places = np.unique(rows.tokens, return_inverse=True)
        return cls(tokens, csr_matrix((rows.weights, (places, passages)), (len(tokens), count)), count)

    def search(self, query: dict[int, float], hits: int) -> Ranking:
        """The passages with the greatest sum over shared tokens of query weight × passage weight, if above 0."""
        wanted = np.fromiter(query, np.int64, len(query))
        rows = np.searchsorted(self._tokens, wanted)
        known = rows < len(self._tokens)
        known[known] = self._tokens[rows[known]] == wanted[known]
        if not known.any():
            return []
        weights = np.fromiter(query.values(), np.float32, len(query))[known]
        scores = self._postings[rows[known]].T @ weights  # [passages]
        best = np.lexsort((np.arange(self._count), -scores))[:hits]
        return [(int(passage), float(scores[passage])) for passage in best if scores[passage] > 0]


def _widened(parts: Sequence[PassageVectors]) -> Iterator[np.ndarray]:
    """All vectors in order, as float32."""
    for part in parts:
        for begin in range(0, len(part.dense), _ROWS_AT_ONCE):
            yield part.dense[begin : begin + _ROWS_AT_ONCE].astype(np.float32)


def _sample(parts: Sequence[PassageVectors], count: int, size: int) -> np.ndarray:
    """`size` of `count` vectors, always the same of the same parts, as float32."""
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:size])
    sampled, first = [], 0
    for part in parts:
        begin, end = np.searchsorted(chosen, (first, first + len(part.dense)))
        sampled.append(part.dense[chosen[begin:end] - first].astype(np.float32))
        first += len(part.dense)
    return np.concatenate(sampled)


def _on_gpu(dense: Any) -> Any:
    """A copy of the index on the first GPU. FAISS has no flat scalar quantizer there: a flat fp16 index is the same."""
    import faiss

    options = faiss.GpuClonerOptions()
    options.useFloat16 = True
    if not isinstance(dense, faiss.IndexIVF):
        flat = faiss.IndexFlatIP(dense.d)
        if dense.ntotal:
            flat.add(dense.reconstruct_n(0, dense.ntotal))
        dense = flat
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, dense, options)
