"""Settings of the retrieval pool: the embedder, the passages and the index."""

from typing import Literal

from pydantic import Field

from cluster.config import Settings


class EmbedderConfig(Settings):
    """The model that turns texts into vectors."""

    kind: Literal["bge-m3", "sentence-transformers", "minilm"] = Field(
        "bge-m3", description="bge-m3: FlagEmbedding, dense and sparse; minilm: shipped in a package, no network"
    )
    model: str = Field("BAAI/bge-m3", description="folder or hub name; not used by minilm")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float16", description="weights of the embedder")
    device: str = Field("auto", description="torch device; auto takes cuda where there is one")
    threads: int = Field(0, ge=0, description="torch threads on the CPU; 0 takes torch's default")
    max_tokens: int = Field(512, gt=0, description="tokens of one text; what is longer is cut")
    batch_size: int = Field(64, gt=0, description="texts embedded together, over all requests")
    batch_wait_ms: float = Field(2.0, ge=0, description="milliseconds a text waits for others to join its batch")


class PassageConfig(Settings):
    """How texts are cut into passages."""

    max_characters: int = Field(800, gt=0, description="characters of one passage at most")
    overlap_characters: int = Field(0, ge=0, description="characters that neighbouring passages share")


class IndexConfig(Settings):
    """The index: vectors in FAISS, words beside them."""

    exact_limit: int = Field(100_000, gt=0, description="passages up to which search is exact (fp16); IVF beyond")
    nprobe: int = Field(16, gt=0, description="IVF lists searched")
    dense_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of similarity in a passage's score; the rest is words, and 1 leaves them out",
    )
    lexical: Literal["auto", "bm25"] = Field(
        "auto", description="how words are scored; auto: the embedder's sparse weights, BM25 where it has none"
    )
    gpu: Literal["auto", "never"] = Field("auto", description="auto searches on a GPU where FAISS finds one")
    cached_indexes_mib: int = Field(
        2048,
        gt=0,
        description="MiB of indexes (vectors, words, texts) one Retriever keeps open; the last one whatever its size",
    )
    cached_files_mib: int = Field(
        512, ge=0, description="MiB of passage files one Retriever keeps read, for the next version of their memory"
    )


class SearchConfig(Settings):
    """How rankings become the passages of an answer."""

    hits_per_query: int = Field(10, gt=0, description="passages taken from each ranking")
    passages: int = Field(5, gt=0, description="passages kept after fusion")
    budget_tokens: int = Field(2048, gt=0, description="tokens of all kept passages, by the embedder's tokenizer")
    rrf_k: int = Field(2, gt=0, description="constant of reciprocal-rank fusion: the less, the more first places count")
    evidence: int = Field(3, ge=0, description="sentences quoted as evidence")
    cached_evidence_passages: int = Field(4096, gt=0, description="passages whose sentence vectors one Retriever keeps")


class RetrievalConfig(Settings):
    """Everything of the retrieval pool."""

    embedder: EmbedderConfig = EmbedderConfig()
    passages: PassageConfig = PassageConfig()
    index: IndexConfig = IndexConfig()
    search: SearchConfig = SearchConfig()
