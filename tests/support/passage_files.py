"""Passage files of made-up texts and vectors, for tests that need no model."""

import numpy as np
import pyarrow as pa

from cluster.storage.durable import Storage, StoredFile
from retrieval_worker.messages import EmbedderDescription, Embeddings, IndexPart
from retrieval_worker.passage_file import Piece, write_passages
from retrieval_worker.vectors import PassageVectors


def described(sparse: bool = False, model: str = "made-up", dimension: int = 64) -> EmbedderDescription:
    return EmbedderDescription(model, dimension, sparse, 512)


def unit(count: int, dimension: int = 64, seed: int = 0) -> np.ndarray:
    """Vectors in loose clusters, as those of texts are."""
    chance = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(50, dimension))
    vectors = centres[chance.integers(0, 50, count)] + chance.normal(size=(count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_sparse(count: int, seed: int = 0) -> list[dict[int, float]]:
    chance = np.random.default_rng(seed)
    return [{int(t): float(chance.random()) for t in chance.integers(0, 400, 12)} for _ in range(count)]


def made_vectors(count: int, sparse: bool = False, seed: int = 0) -> PassageVectors:
    return PassageVectors.of(Embeddings(unit(count, seed=seed), random_sparse(count, seed) if sparse else None))


def write_made(storage: Storage, path: str, count: int, sparse: bool = False, seed: int = 0) -> StoredFile:
    """A file of `count` passages `é😀 0`, `é😀 1`, …"""
    pieces = [Piece(20 * i, 20 * i + len(f"é😀 {i}"), f"é😀 {i}", 3) for i in range(count)]
    source = StoredFile(f"{path}.txt", 10, "5" * 64)
    vectors = made_vectors(count, sparse, seed)
    return write_passages(storage, path, pieces, vectors, source=source, embedder=described(sparse))


def part(file: StoredFile) -> IndexPart:
    """`file`, which lies at `<tenant>/<memory>/…/<document>.safetensors`, as a part of that memory."""
    names = file.path.split("/")
    return IndexPart(names[1], names[-1].removesuffix(".safetensors"), file)


def buffer(storage: Storage, file: StoredFile) -> pa.Buffer:
    """A copy of the file's bytes."""
    return pa.py_buffer(bytes(storage.read(file)))
