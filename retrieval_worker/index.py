"""The index of passages: vectors in FAISS, and words beside them. Built in memory and searched by the Retriever.

A query's ranking is hybrid: a passage scores `dense_weight` × its similarity + the rest × its lexical score, each over
the best of that query. Such a sum of scores finds more than either part, and more than the fusion of their ranks
(Bruch et al., TOIS 2023, arXiv 2210.11934); docs/quality.md has what it finds here.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from retrieval_worker.bm25 import Bm25
from retrieval_worker.config import IndexConfig
from retrieval_worker.messages import EmbedderDescription, Embeddings
from retrieval_worker.vectors import PassageVectors, SparseRows

_TRAINING_VECTORS_PER_LIST = 64  # FAISS wants 39 to 256
_ROWS_AT_ONCE = 16_384  # FAISS takes float32: so many rows are widened at a time

Found = list[tuple[int, float]]  # passage id and score, best first


class Lexical(Protocol):
    """Scores of passages by the words they share with a query."""

    def scores(self, text: str, sparse: dict[int, float] | None) -> np.ndarray:
        """float32 `[passages]` for a query's text and its sparse weights; 0 where nothing is shared."""

    def measure_grounding(self, text: str, sparse: dict[int, float] | None) -> float:
        """0 to 1: the most of the query's words, each by its weight or its rarity, that one passage holds."""

    @property
    def bytes(self) -> int:
        """What it holds in memory."""


class PassageIndex:
    """Passages `0 … n-1`. Immutable, so that threads may search it together."""

    def __init__(self, dense: Any, vectors: Any, lexical: Lexical | None, dense_weight: float) -> None:
        self._dense = dense  # the faiss.Index that is searched
        self._vectors = vectors  # one that gives vectors back: the same, or what was copied to a GPU
        self._lexical = lexical
        self._dense_weight = dense_weight if lexical else 1.0

    @classmethod
    def build(
        cls,
        parts: Sequence[PassageVectors],
        texts: Iterable[str],
        embedder: EmbedderDescription,
        config: IndexConfig,
    ) -> "PassageIndex":
        """The passages of all parts, one after another, with their texts; searched by what `embedder` makes of a query.

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
            dense.make_direct_map()  # to give vectors back
        for rows in _widen(parts):
            dense.add(rows)
        searched = _on_gpu(dense) if config.gpu == "auto" and faiss.get_num_gpus() > 0 else dense
        return cls(searched, dense, _lexical(parts, texts, embedder, config), config.dense_weight)

    @property
    def count(self) -> int:
        """Passages in it."""
        return int(self._vectors.ntotal)

    @property
    def bytes(self) -> int:
        """What it holds in memory: vectors in fp16, beyond the exact limit their ids and places in lists, and words."""
        import faiss

        lists = 16 * self.count if isinstance(self._vectors, faiss.IndexIVF) else 0
        return 2 * self._vectors.d * self.count + lists + (self._lexical.bytes if self._lexical else 0)

    def search(self, text: str, query: Embeddings, row: int, hits: int) -> Found:
        """The passages that fit `text`, which is row `row` of `query`, best first.

        The best `hits` by similarity and the best `hits` by words are scored by both, and the best of them returned.
        """
        if not self.count:
            return []
        vector, share = query.dense[row : row + 1], self._dense_weight
        near: Found = []
        if share > 0:
            scores, ids = self._dense.search(vector, min(hits, self.count))
            near = [(id, score) for id, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True) if id >= 0]
        if self._lexical is None or share == 1:
            return near
        words = self._lexical.scores(text, None if query.sparse is None else query.sparse[row])
        found = np.unique([*(id for id, _ in near), *_best(words, hits).tolist()]).astype(np.int64)
        if not len(found):
            return []
        total = (1 - share) * words[found] / _scale(words.max())
        if share > 0:
            similarities = self._vectors.reconstruct_batch(found) @ vector[0]
            total += share * similarities / _scale(similarities.max())
        order = np.lexsort((found, -total))[:hits]
        return [(int(found[place]), float(total[place])) for place in order]

    def measure_grounding(self, text: str, query: Embeddings, row: int) -> float:
        """0 to 1: how much of `text`, which is row `row` of `query`, one passage says in its words.

        1 in an index without words, which cannot tell.
        """
        if self._lexical is None:
            return 1.0
        return self._lexical.measure_grounding(text, None if query.sparse is None else query.sparse[row])


class SparseWeights:
    """Learned token weights of passages, by token: a query reads the rows of its own tokens only."""

    def __init__(self, tokens: np.ndarray, postings: Any, count: int) -> None:
        self._tokens = tokens  # int32 [distinct tokens], ascending
        self._postings = postings  # scipy CSR float32 [distinct tokens, passages]
        self._count = count

    @classmethod
    def build(cls, parts: Sequence[SparseRows]) -> "SparseWeights":
        from scipy.sparse import csr_matrix

        rows = SparseRows.join(parts)
        count = len(rows.offsets) - 1
        passages = np.repeat(np.arange(count, dtype=np.int32), np.diff(rows.offsets))
        tokens, places = np.unique(rows.tokens, return_inverse=True)
        return cls(tokens, csr_matrix((rows.weights, (places, passages)), (len(tokens), count)), count)

    @property
    def bytes(self) -> int:
        arrays = (self._tokens, self._postings.data, self._postings.indices, self._postings.indptr)
        return sum(array.nbytes for array in arrays)

    def scores(self, text: str, sparse: dict[int, float] | None) -> np.ndarray:
        """float32 `[passages]`: the sum over shared tokens of query weight × passage weight."""
        rows, weights = self._find_known(sparse or {})
        scores: np.ndarray = self._postings[rows].T @ weights
        return scores

    def measure_grounding(self, text: str, sparse: dict[int, float] | None) -> float:
        """Of the query's weights, summed, the share of the tokens that one passage has, at most."""
        if not sparse:
            return 0.0
        rows, weights = self._find_known(sparse)
        held = self._postings[rows].sign().T @ weights
        return min(1.0, float(held.max(initial=0.0)) / sum(sparse.values()))

    def _find_known(self, query: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the query's tokens that some passage has, and their weights in the query."""
        wanted = np.fromiter(query, np.int64, len(query))
        rows = np.searchsorted(self._tokens, wanted)
        known = rows < len(self._tokens)
        known[known] = self._tokens[rows[known]] == wanted[known]
        return rows[known], np.fromiter(query.values(), np.float32, len(query))[known]


def _lexical(
    parts: Sequence[PassageVectors], texts: Iterable[str], embedder: EmbedderDescription, config: IndexConfig
) -> Lexical | None:
    if config.dense_weight == 1:
        return None
    if embedder.has_sparse and config.lexical == "auto":
        return SparseWeights.build([part.sparse for part in parts if part.sparse is not None])
    return Bm25(texts)


def _best(scores: np.ndarray, hits: int) -> np.ndarray:
    """The ids of the `hits` highest scores above 0, the lower id first among equals; only those are sorted."""
    least = np.partition(scores, -hits)[-hits] if hits < len(scores) else 0.0
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    best: np.ndarray = candidates[np.lexsort((candidates, -scores[candidates]))][:hits]
    return best


def _scale(best: float) -> float:
    """What scores are divided by, so that the best is 1; cosines may all be negative, and stay as they are."""
    return best if best > 0 else 1.0


def _widen(parts: Sequence[PassageVectors]) -> Iterator[np.ndarray]:
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
