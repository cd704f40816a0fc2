"""The FAISS index and the sparse weights against brute force, and through storage."""

import numpy as np
import pytest

from cluster.storage import DamagedFile, Storage
from retrieval_worker.config import IndexConfig
from retrieval_worker.index import PassageIndex, SparseWeights
from retrieval_worker.messages import Embeddings


def unit(count: int, dimension: int = 64, seed: int = 0) -> np.ndarray:
    """Vectors in loose clusters, as those of texts are."""
    chance = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(50, dimension))
    vectors = centres[chance.integers(0, 50, count)] + chance.normal(size=(count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_sparse(count: int, seed: int = 0) -> list[dict[int, float]]:
    chance = np.random.default_rng(seed)
    return [{int(t): float(chance.random()) for t in chance.integers(0, 400, 12)} for _ in range(count)]


def recall(index: PassageIndex, vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
    found = [index.search(Embeddings(queries, None), row, k)[0] for row in range(len(queries))]
    return float(np.mean([len({i for i, _ in f} & set(t.tolist())) / k for f, t in zip(found, true, strict=True)]))


def test_exact_index_is_brute_force_over_fp16():
    vectors = unit(3000).astype(np.float16).astype(np.float32)
    index = PassageIndex.build(Embeddings(vectors, None), IndexConfig())
    queries = unit(50, seed=1)
    assert recall(index, vectors, queries) == 1.0
    (best, score), *_ = index.search(Embeddings(queries, None), 0, 3)[0]
    assert score == pytest.approx(float(queries[0] @ vectors[best]), abs=1e-4)


def test_beyond_the_limit_inverted_lists(tmp_path):
    vectors = unit(3000)
    config = IndexConfig(exact_limit=1000)
    index = PassageIndex.build(Embeddings(vectors, None), config)
    storage = Storage(str(tmp_path))
    loaded = PassageIndex.load(storage, index.save(storage, "v/index"), config)
    assert type(loaded._dense).__name__.startswith("IndexIVF") and loaded._dense.nprobe == config.nprobe
    assert recall(loaded, vectors, unit(50, seed=1)) >= 0.9


def test_saved_and_loaded_alike(tmp_path):
    embeddings = Embeddings(unit(500), random_sparse(500))
    storage = Storage(str(tmp_path))
    built = PassageIndex.build(embeddings, IndexConfig())
    loaded = PassageIndex.load(storage, built.save(storage, "v/index"), IndexConfig())
    query = Embeddings(unit(4, seed=3), random_sparse(4, seed=3))
    for row in range(4):
        assert loaded.search(query, row, 10) == built.search(query, row, 10)


def test_sparse_scores_are_dot_products():
    weights, queries = random_sparse(300), random_sparse(20, seed=5)
    index = SparseWeights.build(weights)
    for query in queries:
        true = [sum(v * row.get(t, 0.0) for t, v in query.items()) for row in weights]
        expected = sorted((i for i in range(300) if true[i] > 0), key=lambda i: (-true[i], i))[:10]
        found = index.search(query, 10)
        assert [score for _, score in found] == pytest.approx([true[i] for i in expected], rel=1e-5)
    assert index.search({}, 10) == [] and index.search({10**6: 1.0}, 10) == []


@pytest.mark.parametrize("sparse", [None, []])
def test_empty_index(tmp_path, sparse):
    storage = Storage(str(tmp_path))
    index = PassageIndex.build(Embeddings(np.zeros((0, 64), np.float32), sparse), IndexConfig())
    loaded = PassageIndex.load(storage, index.save(storage, "v/index"), IndexConfig())
    query = Embeddings(unit(1), None if sparse is None else [{3: 1.0}])
    assert loaded.count == 0 and loaded.search(query, 0, 5) == [[]] * (1 if sparse is None else 2)


@pytest.mark.parametrize("name", ["dense.faiss", "sparse.arrow"])
def test_damage_is_found(tmp_path, name):
    storage = Storage(str(tmp_path))
    files = PassageIndex.build(Embeddings(unit(50), random_sparse(50)), IndexConfig()).save(storage, "v/index")
    path = tmp_path / "v/index" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match=name):
        PassageIndex.load(storage, files, IndexConfig())
