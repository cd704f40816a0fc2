"""The `Retriever` deployment: documents into passage files, texts into ranked passages, passages into evidence.

Called by the Router and the job that memorizes; it calls the `Embedder`. `retrieval_applications` makes both.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.pools.pools import PoolConfig
from cluster.routing import ReportsRank, route_by_memory
from cluster.shared_cache import SharedCache
from cluster.storage.durable import DamagedFile, Storage, StoredFile
from retrieval_worker.config import RetrievalConfig
from retrieval_worker.embedder import Embedder
from retrieval_worker.errors import DamagedIndex, EmbedderFailed
from retrieval_worker.evidence import Sentences, choose, sentence_texts
from retrieval_worker.messages import (
    EmbedderDescription,
    Embeddings,
    Evidence,
    EvidenceRequest,
    Hit,
    Index,
    IndexedDocument,
    IndexProgress,
    IndexRequest,
    Passage,
    Ranking,
)
from retrieval_worker.open_index import IndexShelf
from retrieval_worker.passage_file import Piece, read_passages, write_passages
from retrieval_worker.passages import cut
from retrieval_worker.vectors import PassageVectors

logger = logging.getLogger(f"ray.serve.{__name__}")  # with its replica and request id

_BATCHES_IN_FLIGHT = 4  # enough for several Embedder replicas, and bounds what an index job holds
_STORAGE_THREADS = 8

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Retriever(ReportsRank):
    """Keeps recently used indexes open; everything it keeps can be made again from storage.

    Callers give the memories' names as session id, which `cluster.routing` sends to the replica that has them open.
    """

    def __init__(self, config: RetrievalConfig, storage_root: str, embedder: DeploymentHandle) -> None:
        self._config = config
        self._storage = Storage(storage_root)
        self._embedder = embedder
        # Each has threads of its own: while storage hangs, open indexes are searched.
        self._storage_threads = ThreadPoolExecutor(_STORAGE_THREADS, "storage")
        self._search_threads = ThreadPoolExecutor(thread_name_prefix="search")
        self._shelf = IndexShelf(config.index, self._storage, self._storage_threads, self.describe)
        self._sentences: SharedCache[Sentences] = SharedCache(config.search.cached_evidence_passages)

    async def index(self, request: IndexRequest) -> AsyncIterator[IndexProgress | IndexedDocument]:
        """Cuts and embeds a document into its passage file; progress after each batch, at last the record.

        A file that is there already, of this text by this embedder, is taken as it is. Raises `DamagedFile` where
        the text is missing, damaged or not UTF-8, `EmbedderFailed` where its vectors are of no use.
        """
        embedder = await self.describe()
        finished = await _in(self._storage_threads, self._find_finished, request, embedder)
        if finished is not None:
            yield IndexProgress(finished.passage_count, finished.passage_count)
            yield finished
            return
        text = await _in(self._storage_threads, self._read_text, request.source)
        pieces = await self._cut(text, embedder.max_tokens)
        done, parts = 0, []
        yield IndexProgress(done, len(pieces))
        async for batch in self._embed_all([piece.text for piece in pieces]):
            parts.append(PassageVectors.of(batch))
            if not parts[-1].finite:
                raise EmbedderFailed(embedder.model)
            done += len(batch.dense)
            yield IndexProgress(done, len(pieces))
        write = partial(write_passages, source=request.source, embedder=embedder)
        vectors = PassageVectors.join(parts, embedder)
        stored = await _in(self._storage_threads, write, self._storage, request.path, pieces, vectors)
        yield IndexedDocument(stored, len(pieces))

    async def search(self, index: Index, texts: Sequence[str], hits: int | None = None) -> list[Ranking] | None:
        """For each text the passages that fit it, best first, and how far they say the same.

        None where only the index's name is given and none of that name is open here: the caller gives its parts then.

        Raises `DamagedIndex`, which names the file, if one cannot be searched. An index that is open is searched
        whatever has become of its files.
        """
        embedding = asyncio.ensure_future(_result(self._embedder.embed.remote(list(texts), query=True)))
        try:
            opened = await self._shelf.open(index)
            if opened is None:
                return None
            queries = await embedding
        finally:
            embedding.cancel()
        wanted = hits or self._config.search.hits_per_query

        def ranking(text: str, row: int) -> Ranking:
            found = opened.search.search(text, queries, row, wanted)
            hits = tuple(Hit(opened.passage(id), score) for id, score in found)
            return Ranking(hits, opened.search.measure_grounding(text, queries, row))

        def search_all() -> list[Ranking]:
            return [ranking(text, row) for row, text in enumerate(texts)]

        return await _in(self._search_threads, search_all)

    async def evidence(self, request: EvidenceRequest) -> list[Evidence] | None:
        """The sentences of the passages that best support question and answer, best first. None as from `search`.

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
        return None if candidates is None else choose(candidates, vectors.dense, self._config.search.evidence)

    async def prepare_evidence(self, index: Index, passages: Sequence[int]) -> bool | None:
        """Embeds the passages' sentences ahead of `evidence`, such as while the answer is being generated.

        None as from `search`.
        """
        return None if await self._sentences_of(index, passages) is None else True

    async def describe(self) -> EmbedderDescription:
        """The embedder that vectors come from; an answer means that both deployments work."""
        description: EmbedderDescription = await self._embedder.describe.remote()
        return description

    def _find_finished(self, request: IndexRequest, embedder: EmbedderDescription) -> IndexedDocument | None:
        """What an earlier run of the same request has written, if it can be used."""
        try:
            stored = self._storage.record(request.path)
            found = read_passages(self._storage, stored, embedder, found=True)
        except FileNotFoundError:
            return None
        except DamagedIndex as damage:
            logger.warning("%s is written anew: it %s", request.path, damage.reason)
            return None
        return IndexedDocument(stored, len(found.passages)) if found.source == request.source.digest else None

    async def _cut(self, text: str, limit: int) -> list[Piece]:
        """The passages of a text, none with more than `limit` tokens, which is what the embedder reads."""
        settings = self._config.passages
        todo = deque(await asyncio.to_thread(cut, text, settings.max_characters, settings.overlap_characters))
        counts = deque(await self._count([text[start:end] for start, end in todo]))
        pieces: list[Piece] = []
        while todo:
            (start, end), tokens = todo.popleft(), counts.popleft()
            if tokens > limit and end - start > 1:
                # Its tail would go unseen (dense scripts): cut again, to the share that fits.
                size = max(1, min((end - start) * limit // tokens, end - start - 1))
                smaller = [(start + a, start + b) for a, b in cut(text[start:end], size)]
                todo.extendleft(reversed(smaller))
                counts.extendleft(reversed(await self._count([text[a:b] for a, b in smaller])))
                continue
            pieces.append(Piece(start, end, text[start:end], tokens))
        return pieces

    async def _count(self, texts: list[str]) -> list[int]:
        return list(await self._embedder.count_tokens.remote(texts)) if texts else []

    def _read_text(self, source: StoredFile) -> str:
        try:
            return bytes(self._storage.read(source)).decode()
        except UnicodeDecodeError as error:
            raise DamagedFile(source.path, f"is not UTF-8 at byte {error.start}") from None

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

    async def _sentences_of(self, index: Index, ids: Sequence[int]) -> list[tuple[Passage, Sentences]] | None:
        opened = await self._shelf.open(index)
        if opened is None:
            return None
        passages = [opened.passage(id) for id in dict.fromkeys(ids)]
        # Known by file and row, which are the same in the next version; the file's path begins with the tenant.
        made = (
            self._sentences.get(opened.place(passage.id), partial(self._embed_sentences, passage.text))
            for passage in passages
        )
        return list(zip(passages, await asyncio.gather(*made), strict=True))

    async def _embed_sentences(self, text: str) -> Sentences:
        slices, texts = sentence_texts(text)
        vectors: Embeddings = await self._embedder.embed.remote(texts)
        return Sentences(slices, vectors.dense)


def retrieval_applications(
    config: RetrievalConfig, pool: PoolConfig, *, storage_root: str
) -> tuple[Application, Application]:
    """The `Embedder` and the `Retriever` (which holds the former) on a pool, for `serve.run` or to bind further."""
    queued = pool.deployment_options(levels={"queue_s": pool.scaling.queue_s})
    embedder = serve.deployment(Embedder, name="Embedder", **queued).bind(config.embedder)
    options = pool.deployment_options() | route_by_memory()
    retriever = serve.deployment(Retriever, name="Retriever", **options).bind(config, storage_root, embedder)
    return embedder, retriever


async def _result(response: "object") -> Embeddings:
    """Awaits a Serve response as a coroutine, which tasks need."""
    embeddings: Embeddings = await response  # type: ignore[misc]
    return embeddings


async def _in(
    threads: Executor, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """As `asyncio.to_thread`, in threads of one's own."""
    return await asyncio.get_running_loop().run_in_executor(threads, partial(function, *args, **kwargs))
