"""The `Retriever` deployment: documents into indexes, texts into ranked passages, passages into evidence.

Called by the Router and the job that memorizes; it calls the `Embedder`. `retrieval_applications` makes both.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.pools import PoolConfig
from cluster.storage import DamagedFile, Storage
from retrieval_worker.cache import SharedCache
from retrieval_worker.config import RetrievalConfig
from retrieval_worker.embedder import Embedder
from retrieval_worker.errors import DamagedIndex
from retrieval_worker.evidence import PassageSentences, choose, sentence_texts
from retrieval_worker.index import PassageIndex
from retrieval_worker.messages import (
    EmbedderDescription,
    Embeddings,
    Evidence,
    EvidenceRequest,
    Hit,
    Index,
    IndexProgress,
    IndexRequest,
    Passage,
)
from retrieval_worker.passages import PassageFile, cut, write_passages

logger = logging.getLogger(__name__)

_BATCHES_IN_FLIGHT = 4  # enough for several Embedder replicas, and bounds what an index job holds


@dataclass(frozen=True, slots=True)
class _OpenIndex:
    passages: PassageFile
    index: PassageIndex


class Retriever:
    """Keeps recently used indexes open; everything it keeps can be made again from storage."""

    def __init__(self, config: RetrievalConfig, storage_root: str, embedder: DeploymentHandle) -> None:
        self._config = config
        self._storage = Storage(storage_root)
        self._embedder = embedder
        self._open_indexes: SharedCache[_OpenIndex] = SharedCache(config.index.cached_indexes)
        self._sentences: SharedCache[PassageSentences] = SharedCache(config.search.cached_evidence_passages)

    async def index(self, request: IndexRequest) -> AsyncIterator[IndexProgress | Index]:
        """Cuts, embeds and indexes documents; progress after each batch, at last the `Index`.

        Raises `DamagedFile` where a document is missing or not UTF-8.
        """
        passages = await self._cut(request)
        yield IndexProgress(0, len(passages))
        description: EmbedderDescription = await self._embedder.describe.remote()
        parts = [_nothing(description)]
        async for part in self._embed_all([passage.text for passage in passages]):
            parts.append(part)
            yield IndexProgress(sum(len(each.dense) for each in parts), len(passages))
        built = await asyncio.to_thread(PassageIndex.build, _joined(parts), self._config.index)
        files = await asyncio.to_thread(built.save, self._storage, f"{request.folder}/index")
        path = f"{request.folder}/passages.parquet"
        stored = await asyncio.to_thread(write_passages, self._storage, path, passages, _fingerprint(description))
        yield Index(stored, files, len(passages))

    async def search(self, index: Index, texts: Sequence[str], hits: int | None = None) -> list[list[list[Hit]]]:
        """For each text the passages, best first: one ranking by similarity, one more by sparse weights if there are.

        Raises `DamagedIndex` if the passages are not intact; a damaged FAISS file is made again from them.
        """
        embedding = asyncio.ensure_future(_result(self._embedder.embed.remote(list(texts), query=True)))
        try:
            opened = await self._opened(index)
            queries = await embedding
        finally:
            embedding.cancel()
        wanted = hits or self._config.search.hits_per_query

        def search_all() -> list[list[list[tuple[int, float]]]]:
            return [opened.index.search(queries, row, wanted) for row in range(len(texts))]

        return [
            [[Hit(opened.passages[row], score) for row, score in ranking] for ranking in rankings]
            for rankings in await asyncio.to_thread(search_all)
        ]

    async def evidence(self, request: EvidenceRequest) -> list[Evidence]:
        """The sentences of the passages that best support question and answer, best first.

        A sentence scores the mean of its cosine similarities to the question and to the answer; to the
        question alone where the answer is empty.
        """
        if not self._config.search.evidence:
            return []
        targets = [text for text in (request.question, request.answer) if text.strip()]
        if not targets:
            return []
        candidates, vectors = await asyncio.gather(
            self._sentences_of(request.index, request.passages),
            _result(self._embedder.embed.remote(targets, query=True)),
        )
        return choose(candidates, vectors.dense, self._config.search.evidence)

    async def prepare_evidence(self, index: Index, passages: Sequence[int]) -> None:
        """Embeds the passages' sentences ahead of `evidence`, such as while the answer is being generated."""
        await self._sentences_of(index, passages)

    async def describe(self) -> EmbedderDescription:
        """The embedder that vectors come from; an answer means that both deployments work."""
        description: EmbedderDescription = await self._embedder.describe.remote()
        return description

    async def _cut(self, request: IndexRequest) -> list[Passage]:
        """The passages of all documents, none with more tokens than the embedder reads."""
        limit = (await self._embedder.describe.remote()).max_tokens
        settings = self._config.passages
        passages: list[Passage] = []
        for document in request.documents:
            text = await asyncio.to_thread(self._read_text, document.path)
            todo = deque(await asyncio.to_thread(cut, text, settings.max_characters, settings.overlap_characters))
            counts = deque(await self._count([text[start:end] for start, end in todo]))
            while todo:
                (start, end), tokens = todo.popleft(), counts.popleft()
                if tokens > limit and end - start > 1:
                    # Its tail would go unseen (dense scripts): cut again, to the share that fits.
                    size = max(1, min((end - start) * limit // tokens, end - start - 1))
                    smaller = [(start + a, start + b) for a, b in cut(text[start:end], size)]
                    todo.extendleft(reversed(smaller))
                    counts.extendleft(reversed(await self._count([text[a:b] for a, b in smaller])))
                    continue
                passages.append(Passage(len(passages), document.id, start, end, text[start:end], tokens))
        return passages

    async def _count(self, texts: list[str]) -> list[int]:
        return list(await self._embedder.count_tokens.remote(texts)) if texts else []

    def _read_text(self, path: str) -> str:
        try:
            return bytes(self._storage.read_unverified(path)).decode()
        except FileNotFoundError:
            raise DamagedFile(path, "is missing") from None
        except UnicodeDecodeError as error:
            raise DamagedFile(path, f"is not UTF-8 at byte {error.start}") from None

    async def _embed_all(self, texts: list[str]) -> AsyncIterator[Embeddings]:
        """Embeds texts in order, some batches ahead of the one that is yielded."""
        size = self._config.embedder.batch_size
        running: deque[asyncio.Future[Embeddings]] = deque()
        try:
            for begin in range(0, len(texts), size):
                batch = self._embedder.embed.remote(texts[begin : begin + size])
                running.append(asyncio.ensure_future(_result(batch)))
                if len(running) == _BATCHES_IN_FLIGHT:
                    yield await running.popleft()
            while running:
                yield await running.popleft()
        finally:
            for left in running:
                left.cancel()

    async def _opened(self, index: Index) -> _OpenIndex:
        key = (index.passages.digest, tuple(file.digest for file in index.files))
        return await self._open_indexes.get(key, lambda: self._open(index))

    async def _open(self, index: Index) -> _OpenIndex:
        try:
            passages = await asyncio.to_thread(PassageFile, self._storage, index.passages)
        except DamagedFile as error:
            raise DamagedIndex(error.path, error.reason) from error
        description: EmbedderDescription = await self._embedder.describe.remote()
        try:
            if passages.embedder != _fingerprint(description):
                raise DamagedFile(index.passages.path, f"was indexed with embedder {passages.embedder}")
            opened = await asyncio.to_thread(PassageIndex.load, self._storage, index.files, self._config.index)
        except DamagedFile as error:
            logger.warning("index beside %s is rebuilt in memory: %s", index.passages.path, error)
            parts = [_nothing(description)]
            async for part in self._embed_all(passages.texts):
                parts.append(part)
            opened = await asyncio.to_thread(PassageIndex.build, _joined(parts), self._config.index)
        return _OpenIndex(passages, opened)

    async def _sentences_of(self, index: Index, ids: Sequence[int]) -> list[PassageSentences]:
        opened = await self._opened(index)
        digest = index.passages.digest
        return await asyncio.gather(
            *(
                self._sentences.get((digest, row), partial(self._embed_sentences, opened.passages[row]))
                for row in dict.fromkeys(ids)
            )
        )

    async def _embed_sentences(self, passage: Passage) -> PassageSentences:
        slices, texts = sentence_texts(passage)
        vectors: Embeddings = await self._embedder.embed.remote(texts)
        return PassageSentences(passage, slices, vectors.dense)


def retrieval_applications(
    config: RetrievalConfig, pool: PoolConfig, *, storage_root: str
) -> tuple[Application, Application]:
    """The `Embedder` and the `Retriever` (which holds the former) on a pool, for `serve.run` or to bind further."""
    options = pool.deployment_options()
    embedder = serve.deployment(Embedder, name="Embedder", **options).bind(config.embedder)
    retriever = serve.deployment(Retriever, name="Retriever", **options).bind(config, storage_root, embedder)
    return embedder, retriever


async def _result(response: "object") -> Embeddings:
    """Awaits a Serve response as a coroutine, which tasks need."""
    embeddings: Embeddings = await response  # type: ignore[misc]
    return embeddings


def _fingerprint(description: EmbedderDescription) -> str:
    """Names the vector space of an embedder wherever its checkpoint lies."""
    return f"{description.model.rstrip('/').rpartition('/')[2]}:{description.dimension}"


def _nothing(description: EmbedderDescription) -> Embeddings:
    return Embeddings(np.zeros((0, description.dimension), np.float32), [] if description.has_sparse else None)


def _joined(parts: list[Embeddings]) -> Embeddings:
    """Parts as one. Without sparse weights in the first, there are none."""
    sparse = None if parts[0].sparse is None else [row for part in parts for row in part.sparse or []]
    return Embeddings(np.concatenate([part.dense for part in parts]), sparse)
