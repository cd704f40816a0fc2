"""The FAISS index and the sparse weights against brute force."""

from itertools import pairwise

import numpy as np
import pytest

from retrieval_worker.config import IndexConfig
from retrieval_worker.index import PassageIndex, SparseWeights
from retrieval_worker.messages import Embeddings
from retrieval_worker.vectors import PassageVectors, SparseRows
from tests.retrieval_worker.made import described, made_vectors, random_sparse, unit


def vectors_of(dense: np.ndarray, sparse: list[dict[int, float]] | None = None) -> PassageVectors:
    return PassageVectors.of(Embeddings(dense, sparse))


def recall(index: PassageIndex, vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
    found = [index.search(Embeddings(queries, None), row, k)[0] for row in range(len(queries))]
    return float(np.mean([len({i for i, _ in f} & set(t.tolist())) / k for f, t in zip(found, true, strict=True)]))


def in_parts(vectors: np.ndarray, sparse: list[dict[int, float]] | None = None) -> list[PassageVectors]:
    """The same in parts of very different sizes, one of them empty."""
    cuts = [0, 1, 1, len(vectors) // 3, len(vectors)]
    return [vectors_of(vectors[a:b], None if sparse is None else sparse[a:b]) for a, b in pairwise(cuts)]


def test_exact_index_is_brute_force_over_fp16():
    vectors = unit(3000).astype(np.float16).astype(np.float32)
    index = PassageIndex.build([vectors_of(vectors)], described(), IndexConfig())
    queries = unit(50, seed=1)
    assert recall(index, vectors, queries) == 1.0
    (best, score), *_ = index.search(Embeddings(queries, None), 0, 3)[0]
    assert score == pytest.approx(float(queries[0] @ vectors[best]), abs=1e-4)


def test_beyond_the_limit_inverted_lists():
    vectors = unit(3000)
    config = IndexConfig(exact_limit=1000)
    index = PassageIndex.build(in_parts(vectors), described(), config)
    assert type(index._dense).__name__.startswith("IndexIVF") and index._dense.nprobe == config.nprobe
    assert index.count == 3000 and recall(index, vectors, unit(50, seed=1)) >= 0.9


@pytest.mark.parametrize("limit", [100_000, 400])
def test_parts_are_searched_as_one(limit):
    vectors, weights, config = unit(500), random_sparse(500), IndexConfig(exact_limit=limit)
    whole = PassageIndex.build([vectors_of(vectors, weights)], described(True), config)
    parts = PassageIndex.build(in_parts(vectors, weights), described(True), config)
    query = Embeddings(unit(4, seed=3), random_sparse(4, seed=3))
    for row in range(4):
        assert parts.search(query, row, 10) == whole.search(query, row, 10)


def test_sparse_scores_are_dot_products():
    weights, queries = random_sparse(300), random_sparse(20, seed=5)
    index = SparseWeights.build([SparseRows.of(weights[:100]), SparseRows.of(weights[100:])])
    for query in queries:
        true = [sum(v * row.get(t, 0.0) for t, v in query.items()) for row in weights]
        expected = sorted((i for i in range(300) if true[i] > 0), key=lambda i: (-true[i], i))[:10]
        found = index.search(query, 10)
        assert [score for _, score in found] == pytest.approx([true[i] for i in expected], rel=1e-5)
    assert index.search({}, 10) == [] and index.search({10**6: 1.0}, 10) == []


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_empty_index(sparse, parts):
    index = PassageIndex.build([made_vectors(0, sparse)] * parts, described(sparse), IndexConfig())
    query = Embeddings(unit(1), [{3: 1.0}] if sparse else None)
    assert index.count == 0 and index.search(query, 0, 5) == [[]] * (2 if sparse else 1)
