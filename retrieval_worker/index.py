"""The FAISS index of one memory version and its sparse weights: built, saved, loaded and searched by the Retriever."""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.storage import Storage, StoredFile
from retrieval_worker.config import IndexConfig
from retrieval_worker.messages import Embeddings

DENSE_FILE, SPARSE_FILE = "dense.faiss", "sparse.arrow"
_TRAINING_VECTORS_PER_LIST = 64  # FAISS wants 39 to 256

Ranking = list[tuple[int, float]]  # passage id and score, best first


class PassageIndex:
    """Vectors and sparse weights of passages `0 … n-1`. Immutable, so that threads may search it together."""

    def __init__(self, dense: Any, sparse: "SparseWeights | None", config: IndexConfig) -> None:
        import faiss

        self._dense = dense  # a faiss.Index on the CPU: what is saved
        self.sparse = sparse
        if isinstance(dense, faiss.IndexIVF):
            dense.nprobe = config.nprobe
        self._searched = _on_gpu(dense, config) if config.gpu == "auto" and faiss.get_num_gpus() > 0 else dense

    @classmethod
    def build(cls, embeddings: Embeddings, config: IndexConfig) -> "PassageIndex":
        """Exact search over fp16 vectors up to `config.exact_limit` passages, inverted lists of them beyond."""
        import faiss

        vectors = np.ascontiguousarray(embeddings.dense, np.float32)
        count, dimension = vectors.shape
        if count <= config.exact_limit:
            dense = faiss.index_factory(dimension, "SQfp16", faiss.METRIC_INNER_PRODUCT)
        else:
            lists = max(1, min(int(4 * math.sqrt(count)), count // 39))
            dense = faiss.index_factory(dimension, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
            sample = np.random.default_rng(0).permutation(count)[: lists * _TRAINING_VECTORS_PER_LIST]
            dense.train(vectors[np.sort(sample)])
        dense.add(vectors)
        sparse = None if embeddings.sparse is None else SparseWeights.build(embeddings.sparse)
        return cls(dense, sparse, config)

    def save(self, storage: Storage, folder: str) -> tuple[StoredFile, ...]:
        import faiss

        files = [storage.write(f"{folder}/{DENSE_FILE}", faiss.serialize_index(self._dense).tobytes())]
        if self.sparse is not None:
            files.append(self.sparse.save(storage, f"{folder}/{SPARSE_FILE}"))
        return tuple(files)

    @classmethod
    def load(cls, storage: Storage, files: tuple[StoredFile, ...], config: IndexConfig) -> "PassageIndex":
        """Reads what `save` wrote. Raises `DamagedFile` if a file is not what its record says."""
        import faiss

        by_name = {file.path.rpartition("/")[2]: file for file in files}
        dense = faiss.deserialize_index(np.frombuffer(storage.read(by_name[DENSE_FILE]), np.uint8))
        sparse = SparseWeights.load(storage, by_name[SPARSE_FILE]) if SPARSE_FILE in by_name else None
        return cls(dense, sparse, config)

    @property
    def count(self) -> int:
        """Passages in it."""
        return int(self._dense.ntotal)

    @property
    def dimension(self) -> int:
        return int(self._dense.d)

    def search(self, query: Embeddings, row: int, hits: int) -> list[Ranking]:
        """Rankings for text `row` of `query`: by similarity and, where there are sparse weights, by those."""
        scores, ids = self._searched.search(query.dense[row : row + 1], min(hits, max(self.count, 1)))
        found = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
        rankings = [[(passage, score) for passage, score in found if passage >= 0]]
        if self.sparse is not None and query.sparse is not None:
            rankings.append(self.sparse.search(query.sparse[row], hits))
        return rankings


class SparseWeights:
    """Learned token weights of passages, by token: a query reads the rows of its own tokens only."""

    def __init__(self, tokens: np.ndarray, postings: Any, count: int) -> None:
        self._tokens = tokens  # int64 [distinct tokens], ascending
        self._postings = postings  # scipy CSR float32 [distinct tokens, passages]
        self._count = count

    @classmethod
    def build(cls, weights: list[dict[int, float]]) -> "SparseWeights":
        from scipy.sparse import csr_matrix

        lengths = [len(row) for row in weights]
        passages = np.repeat(np.arange(len(weights), dtype=np.int64), lengths)
        token_ids = np.fromiter((token for row in weights for token in row), np.int64, sum(lengths))
        values = np.fromiter((value for row in weights for value in row.values()), np.float32, sum(lengths))
        tokens, rows = np.unique(token_ids, return_inverse=True)
        return cls(tokens, csr_matrix((values, (rows, passages)), (len(tokens), len(weights))), len(weights))

    def save(self, storage: Storage, path: str) -> StoredFile:
        """One Arrow row per token: the token, the passages that have it, and their weights."""
        offsets = pa.array(self._postings.indptr, pa.int64())
        table = pa.table(
            {
                "token": pa.array(self._tokens, pa.int64()),
                "passages": pa.LargeListArray.from_arrays(offsets, pa.array(self._postings.indices, pa.int32())),
                "weights": pa.LargeListArray.from_arrays(offsets, pa.array(self._postings.data, pa.float32())),
            }
        ).replace_schema_metadata({"passages": str(self._count)})
        with storage.writer(path) as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.stored

    @classmethod
    def load(cls, storage: Storage, file: StoredFile) -> "SparseWeights":
        from scipy.sparse import csr_matrix

        table = pa.ipc.open_file(storage.read(file)).read_all().combine_chunks()
        count = int(table.schema.metadata[b"passages"])
        tokens = table["token"].to_numpy()
        if not len(tokens):
            return cls(tokens, csr_matrix((0, count), dtype=np.float32), count)
        passages, weights = table["passages"].chunk(0), table["weights"].chunk(0)
        parts = (weights.values.to_numpy(), passages.values.to_numpy(), passages.offsets.to_numpy())
        return cls(tokens, csr_matrix(parts, (len(tokens), count)), count)

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


def _on_gpu(dense: Any, config: IndexConfig) -> Any:
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
