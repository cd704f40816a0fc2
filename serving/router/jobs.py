"""Making versions of memories: each Router takes jobs from the Catalog and does them.

A job encodes the new documents' segments and indexes their passages at the same time, then publishes the manifest.
Until then nothing of the version is visible. A job whose worker died is taken by another, which goes on from the last
checkpoint; what fails is recorded with the memory.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle
from tenacity import AsyncRetrying, before_sleep_log, retry_if_exception, stop_after_attempt, wait_fixed

from cluster.errors import cause_of
from memory_worker.catalog.quotas import QuotasConfig
from memory_worker.config import CatalogConfig
from memory_worker.errors import JobEnded
from memory_worker.manifest import Document, DocumentEntry, Manifest, MemoryKey, now
from memory_worker.messages import Job, Language, MemorizeProgress, MemorizeRequest, MemorizeResult
from memory_worker.storage.store import passages_path
from retrieval_worker.messages import IndexedDocument, IndexProgress, IndexRequest
from serving.errors import is_unavailable, problem_for
from serving.router.usage_metrics import UsageMetrics

logger = logging.getLogger(f"ray.serve.{__name__}")  # with its replica and request id

_TAKE_S = 2.0  # how long one call to the catalog waits: a job given to a caller that died waits for its lease to end
_REPORT_S = 2.0  # a job says that it lives at least so often
_ATTEMPTS = 5  # a worker that dies is replaced; one that dies again and again is not to blame on the replicas


class Jobs:
    """The jobs of one Router."""

    def __init__(
        self,
        catalog: ActorHandle[Any],
        manifest_of: Callable[[MemoryKey], Awaitable[Manifest]],
        settings: tuple[CatalogConfig, QuotasConfig],
        memorizer: DeploymentHandle,
        retriever: DeploymentHandle,
        on_ready: Callable[[Manifest], Awaitable[None]],
    ) -> None:
        """`manifest_of` reads that of a ready version; `on_ready` is told of each version that was published."""
        self._catalog = catalog
        self._manifest_of = manifest_of
        self._settings = settings
        self._memorizer = memorizer
        self._retriever = retriever
        self._on_ready = on_ready
        self._metrics = UsageMetrics()
        self._runner = uuid.uuid4().hex
        self._running: set[asyncio.Task[None]] = set()

    async def run_forever(self) -> None:
        """Takes jobs as the catalog gives them."""

        async def take() -> Job | None:
            taken: Job | None = await self._catalog.take.remote(self._runner, _TAKE_S, self._settings)
            return taken

        # Whatever is raised: without this loop no job is ever done.
        log = before_sleep_log(logger, logging.ERROR, exc_info=True)
        retrying = AsyncRetrying(wait=wait_fixed(1.0), before_sleep=log)
        while True:
            job: Job | None = await retrying(take)
            if job:
                task = asyncio.create_task(self._run(job))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _run(self, job: Job) -> None:
        try:
            manifest = await self._make(job)
            await self._catalog.publish.remote(manifest)
            made = {document.id for document in job.record.documents}
            self._metrics.count_memorized(job.key.tenant, sum(d.tokens for d in manifest.documents if d.id in made))
            logger.info("%s is ready", job.key.path)
            await self._on_ready(manifest)
        except Exception as error:
            # A boundary: nobody awaits this task, so the memory itself carries what went wrong.
            cause = cause_of(error)
            if isinstance(cause, JobEnded):
                logger.info("%s: %s", job.key.path, cause)
                return
            logger.error("making %s failed", job.key.path, exc_info=cause)
            await self._give_up(job, problem_for(cause).detail)

    async def _give_up(self, job: Job, detail: str) -> None:
        try:
            await self._catalog.fail.remote(job.key, detail)
        except Exception as error:
            if not isinstance(cause_of(error), JobEnded):  # it was cancelled meanwhile, and that is as well
                raise

    async def _make(self, job: Job) -> Manifest:
        """The version's manifest, once all that it names is durable. A worker that dies is waited for."""
        base = await self._manifest_of(job.base) if job.base else None

        async def make() -> Manifest:
            report = _Report(self._catalog, self._runner, job)
            async with asyncio.TaskGroup() as group:
                reporting = group.create_task(report.keep_up())
                encoding = group.create_task(self._memorize(job, base, report))
                indexing = group.create_task(self._index(job, report))
                encoded, indexed = await encoding, await indexing
                reporting.cancel()
            return _manifest(job, base, encoded, indexed)

        retrying = AsyncRetrying(
            retry=retry_if_exception(is_unavailable),
            stop=stop_after_attempt(_ATTEMPTS),
            before_sleep=before_sleep_log(logger, logging.WARNING),
            reraise=True,
        )
        made: Manifest = await retrying(make)
        return made

    async def _memorize(self, job: Job, base: Manifest | None, report: "_Report") -> MemorizeResult:
        record = job.record
        request = MemorizeRequest(
            key=job.key,
            documents=record.documents,
            ratio=record.ratio,
            language=language_of(record.language),
            # A repair may be one of the head itself: it is made anew, and is the same again.
            head=base.head if base and record.kind != "repair" else None,
            kind=record.memory_kind,
        )
        stream = self._memorizer.options(stream=True).memorize.remote(request)
        made: MemorizeResult = await _follow(stream, MemorizeProgress, report.note_memorized)
        return made

    async def _index(self, job: Job, report: "_Report") -> list[IndexedDocument]:
        made: list[IndexedDocument] = []
        for document in job.record.documents:
            request = IndexRequest(document.source, passages_path(job.key, document.id))
            stream = self._retriever.options(stream=True).index.remote(request)
            made.append(await _follow(stream, IndexProgress, partial(report.note_indexed, document)))
            report.note_indexed_whole(document)
        return made


async def _follow(stream: Any, progress: type, note: Callable[[Any], Awaitable[None]]) -> Any:
    """The result that a worker's stream ends with; `note` is told of what comes before it. Cancels what is not done."""
    try:
        async for item in stream:
            if not isinstance(item, progress):
                return item
            await note(item)
    finally:
        stream.cancel()
    raise RuntimeError(f"a worker's stream ended after {progress.__name__}, without a result")


class _Report:
    """What a job tells the catalog: the tokens that are both encoded and, by the share of characters, indexed."""

    def __init__(self, catalog: ActorHandle[Any], runner: str, job: Job) -> None:
        self._catalog = catalog
        self._runner = runner
        self._job = job
        self._characters = max(1, sum(d.characters for d in job.record.documents))
        self._indexed = 0  # characters of the documents that are done
        self._share = 0.0
        self._done = self._total = 0

    async def note_memorized(self, progress: MemorizeProgress) -> None:
        self._done, self._total = progress.done_tokens, progress.total_tokens
        await self._send()

    async def note_indexed(self, document: Document, progress: IndexProgress) -> None:
        share = progress.done_passages / max(1, progress.total_passages)
        self._share = (self._indexed + document.characters * share) / self._characters
        await self._send()

    def note_indexed_whole(self, document: Document) -> None:
        self._indexed += document.characters
        self._share = self._indexed / self._characters

    async def keep_up(self) -> None:
        """Says that the job is alive, also while a worker is being replaced; until cancelled."""
        while True:
            await self._send()
            await asyncio.sleep(_REPORT_S)

    async def _send(self) -> None:
        done = min(self._done, int(self._total * self._share))
        await self._catalog.progress.remote(self._job.key, self._runner, done, self._total)


def language_of(name: str) -> Language:
    """The prompts' language for a text's: Chinese for Chinese, English for all others."""
    return "zh" if name == "zh" else "en"


def _manifest(job: Job, base: Manifest | None, encoded: MemorizeResult, indexed: list[IndexedDocument]) -> Manifest:
    """The base's documents, those that were made again in their place, new ones behind them."""
    record = job.record
    made = {
        document.id: DocumentEntry(
            **dict(document), segments=segments, passages=passages.passages, passage_count=passages.passage_count
        )
        for document, segments, passages in zip(record.documents, encoded.segments, indexed, strict=True)
    }
    documents = {entry.id: entry for entry in base.documents} if base else {}
    return Manifest(
        tenant=job.key.tenant,
        memory=job.key.memory,
        version=job.key.version,
        parent=base.version if base else None,
        created=now(),
        title=record.title,
        tags=record.tags,
        kind=record.memory_kind,
        model=encoded.model,
        fingerprint=encoded.fingerprint,
        ratio=record.ratio,
        language=record.language,
        shape=encoded.shape,
        head_tokens=encoded.head_tokens,
        head=encoded.head,
        documents=tuple((documents | made).values()),
    )
