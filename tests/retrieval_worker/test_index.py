"""The FAISS index, the sparse weights and their sum against brute force."""

from itertools import pairwise

import numpy as np
import pytest

from retrieval_worker.bm25 import Bm25
from retrieval_worker.config import IndexConfig
from retrieval_worker.index import PassageIndex, SparseWeights, _best
from retrieval_worker.messages import Embeddings
from retrieval_worker.vectors import PassageVectors, SparseRows
from tests.support.passage_files import described, made_vectors, random_sparse, unit

VECTORS = IndexConfig(dense_weight=1)


def vectors_of(dense: np.ndarray, sparse: list[dict[int, float]] | None = None) -> PassageVectors:
    return PassageVectors.of(Embeddings(dense, sparse))


def recall(index: PassageIndex, vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
    found = [index.search("", Embeddings(queries, None), row, k) for row in range(len(queries))]
    return float(np.mean([len({i for i, _ in f} & set(t.tolist())) / k for f, t in zip(found, true, strict=True)]))


def in_parts(vectors: np.ndarray, sparse: list[dict[int, float]] | None = None) -> list[PassageVectors]:
    """The same in parts of very different sizes, one of them empty."""
    cuts = [0, 1, 1, len(vectors) // 3, len(vectors)]
    return [vectors_of(vectors[a:b], None if sparse is None else sparse[a:b]) for a, b in pairwise(cuts)]


def test_exact_index_is_brute_force_over_fp16():
    vectors = unit(3000).astype(np.float16).astype(np.float32)
    index = PassageIndex.build([vectors_of(vectors)], (), described(), VECTORS)
    queries = unit(50, seed=1)
    assert recall(index, vectors, queries) == 1.0
    (best, score), *_ = index.search("", Embeddings(queries, None), 0, 3)
    assert score == pytest.approx(float(queries[0] @ vectors[best]), abs=1e-4)


def test_beyond_the_limit_inverted_lists():
    vectors = unit(3000)
    config = IndexConfig(exact_limit=1000, dense_weight=1)
    index = PassageIndex.build(in_parts(vectors), (), described(), config)
    assert type(index._dense).__name__.startswith("IndexIVF") and index._dense.nprobe == config.nprobe
    assert index.count == 3000 and recall(index, vectors, unit(50, seed=1)) >= 0.9


@pytest.mark.parametrize("limit", [100_000, 400])
def test_parts_are_searched_as_one(limit):
    vectors, weights, config = unit(500), random_sparse(500), IndexConfig(exact_limit=limit)
    whole = PassageIndex.build([vectors_of(vectors, weights)], (), described(True), config)
    parts = PassageIndex.build(in_parts(vectors, weights), (), described(True), config)
    query = Embeddings(unit(4, seed=3), random_sparse(4, seed=3))
    for row in range(4):
        assert parts.search("", query, row, 10) == whole.search("", query, row, 10)


def test_sparse_scores_are_dot_products():
    weights, queries = random_sparse(300), random_sparse(20, seed=5)
    index = SparseWeights.build([SparseRows.of(weights[:100]), SparseRows.of(weights[100:])])
    for query in queries:
        true = [sum(v * row.get(t, 0.0) for t, v in query.items()) for row in weights]
        assert index.scores("", query) == pytest.approx(np.array(true), rel=1e-5)
    assert not index.scores("", {}).any() and not index.scores("", {10**6: 1.0}).any()


def test_sparse_grounding_is_the_share_of_the_querys_weights_that_one_passage_has():
    weights, queries = random_sparse(300), random_sparse(20, seed=5)
    index = SparseWeights.build([SparseRows.of(weights[:100]), SparseRows.of(weights[100:])])
    for query in queries:
        held = [sum(v for t, v in query.items() if t in row) for row in weights]
        assert index.measure_grounding("", query) == pytest.approx(max(held) / sum(query.values()), rel=1e-5)
    assert index.measure_grounding("", weights[7]) == pytest.approx(1) and index.measure_grounding("", weights[7]) <= 1
    assert index.measure_grounding("", {}) == 0 and index.measure_grounding("", {10**6: 1.0}) == 0


TEXTS = ["The gate opened.", "A keeper opens gates, a gate and a gate.", "Bread costs two coins.", "Nothing of that."]


@pytest.mark.parametrize("limit", [100_000, 1])
def test_a_passage_scores_similarity_and_words_each_over_the_best(limit):
    vectors = unit(len(TEXTS)).astype(np.float16).astype(np.float32)
    query = Embeddings(unit(1, seed=1), None)
    words = Bm25(TEXTS).scores("When do gates open?")
    similar = vectors @ query.dense[0]
    for share in (0.0, 0.25, 0.5, 1.0):
        config = IndexConfig(dense_weight=share, exact_limit=limit, nprobe=100)
        index = PassageIndex.build([vectors_of(vectors)], TEXTS, described(), config)
        found = dict(index.search("When do gates open?", query, 0, 10))
        both = (1 - share) * words / words.max() + share * similar / similar.max()
        expected = similar if share == 1 else both
        assert found == pytest.approx({i: expected[i] for i in range(4) if share or words[i] > 0}, abs=2e-3)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert list(index.search("When do gates open?", query, 0, 1)) == list(found.items())[:1] or 0 < share < 1


def test_what_has_no_words_in_common_is_found_by_similarity_alone():
    index = PassageIndex.build([made_vectors(4)], TEXTS, described(), IndexConfig())
    query = Embeddings(made_vectors(4).dense[2:3].astype(np.float32), None)
    assert index.search("?", query, 0, 2)[0][0] == 2
    words_only = PassageIndex.build([made_vectors(4)], TEXTS, described(), IndexConfig(dense_weight=0))
    assert index.measure_grounding("?", query, 0) == 0 and index.measure_grounding(
        "Bread costs coins.", query, 0
    ) == pytest.approx(1)
    similarity_only = PassageIndex.build([made_vectors(4)], TEXTS, described(), IndexConfig(dense_weight=1))
    assert similarity_only.measure_grounding("?", query, 0) == 1, "cannot tell"
    assert words_only.search("?", query, 0, 2) == [] and [i for i, _ in words_only.search("coins", query, 0, 2)] == [2]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_empty_index(sparse, parts):
    index = PassageIndex.build([made_vectors(0, sparse)] * parts, (), described(sparse), IndexConfig())
    query = Embeddings(unit(1), [{3: 1.0}] if sparse else None)
    assert index.count == 0 and index.search("gate", query, 0, 5) == []
    assert index.measure_grounding("gate", query, 0) == 0


@pytest.mark.parametrize("hits", [1, 3, 50, 5000])
def test_the_best_words_are_those_of_a_whole_sort(hits):
    """Scores with many equals, and many zeros, as the words of a query leave them."""
    draw = np.random.default_rng(hits)
    for count in (1, 2, 49, 50, 51, 3000):
        scores = (draw.integers(0, 6, count) * (draw.random(count) < 0.7)).astype(np.float32)
        whole = [id for id in np.lexsort((np.arange(count), -scores))[:hits].tolist() if scores[id] > 0]
        assert _best(scores, hits).tolist() == whole
