"""Making memories: the Router runs one job for each, and picks up those that an earlier Router left unfinished.

A job encodes the documents' segments and indexes their passages at the same time, then publishes the manifest.
Until then nothing of the version is visible; what fails is recorded under the memory's name.
"""

import asyncio
import logging
from typing import Any

from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle

from cluster.storage import Storage
from memory_worker.manifest import FileEntry, JobRecord, Manifest, now
from memory_worker.messages import (
    DocumentSource,
    Language,
    MemorizeProgress,
    MemorizeRequest,
    MemorizeResult,
    MemoryKey,
)
from memory_worker.store import source_path
from retrieval_worker.messages import DocumentText, Index, IndexRequest
from serving.errors import problem_for

logger = logging.getLogger(__name__)


class Jobs:
    """The memorize jobs of one Router."""

    def __init__(
        self,
        storage: Storage,
        catalog: ActorHandle[Any],
        memorizer: DeploymentHandle,
        retriever: DeploymentHandle,
    ) -> None:
        self._storage = storage
        self._catalog = catalog
        self._memorizer = memorizer
        self._retriever = retriever
        self._running: dict[MemoryKey, asyncio.Task[None]] = {}

    async def create(self, tenant: str, memory: str, job: JobRecord, texts: list[str]) -> MemoryKey:
        """Reserves the name, makes the texts durable, and starts the job.

        Raises `MemoryExists` where the name is taken.
        """
        key: MemoryKey = await self._catalog.begin.remote(tenant, memory, job)
        try:
            for document, text in zip(job.documents, texts, strict=True):
                await asyncio.to_thread(self._storage.write, source_path(key, document.id), text.encode())
        except OSError as error:
            await self._catalog.fail.remote(key, f"the text could not be stored: {error}")
            raise
        self._start(key, job)
        return key

    async def resume(self) -> None:
        """Starts the jobs that were begun and neither finished nor failed."""
        for key, job in await self._catalog.unfinished.remote():
            logger.info("resuming the job of %s", key.path)
            self._start(key, job)

    async def cancel(self, tenant: str, memory: str) -> None:
        """Ends the running jobs of this memory, if any."""
        for key, task in list(self._running.items()):
            if (key.tenant, key.memory) == (tenant, memory):
                task.cancel()

    def _start(self, key: MemoryKey, job: JobRecord) -> None:
        if key in self._running:
            return
        task = asyncio.create_task(self._run(key, job))
        self._running[key] = task
        task.add_done_callback(lambda _: self._running.pop(key, None))

    async def _run(self, key: MemoryKey, job: JobRecord) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                encoding = group.create_task(self._memorize(key, job))
                indexing = group.create_task(self._index(key, job))
            encoded, index = encoding.result(), indexing.result()
            await self._catalog.publish.remote(
                Manifest(
                    tenant=key.tenant,
                    memory=key.memory,
                    version=key.version,
                    created=now(),
                    title=job.title,
                    model=encoded.model,
                    fingerprint=encoded.fingerprint,
                    ratio=job.ratio,
                    language=job.language,
                    shape=encoded.shape,
                    head_tokens=encoded.head_tokens,
                    head=encoded.head,
                    documents=encoded.documents,
                    passages=FileEntry.of(index.passages),
                    passage_count=index.passage_count,
                    index=tuple(FileEntry.of(file) for file in index.files),
                )
            )
            logger.info("%s is ready: %d passages", key.path, index.passage_count)
        except Exception as error:
            # A boundary: nobody awaits this task, so the memory itself carries what went wrong.
            cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            logger.error("making %s failed", key.path, exc_info=cause)
            await self._catalog.fail.remote(key, problem_for(cause).detail)

    async def _memorize(self, key: MemoryKey, job: JobRecord) -> MemorizeResult:
        request = MemorizeRequest(
            key=key,
            documents=tuple(DocumentSource(d.id, source_path(key, d.id)) for d in job.documents),
            ratio=job.ratio,
            language=language_of(job.language),
        )
        response = self._memorizer.options(stream=True).memorize.remote(request)
        try:
            async for item in response:
                if isinstance(item, MemorizeProgress):
                    await self._catalog.progress.remote(key, item.done_tokens, item.total_tokens)
                else:
                    return item
        finally:
            response.cancel()
        raise RuntimeError("the Memorizer ended without a result")

    async def _index(self, key: MemoryKey, job: JobRecord) -> Index:
        documents = tuple(DocumentText(d.id, source_path(key, d.id)) for d in job.documents)
        response = self._retriever.options(stream=True).index.remote(IndexRequest(key.path, documents))
        try:
            async for item in response:
                if isinstance(item, Index):
                    return item
        finally:
            response.cancel()
        raise RuntimeError("the Retriever ended without an index")


def language_of(name: str) -> Language:
    """The prompts' language for a text's: Chinese for Chinese, English for all others."""
    return "zh" if name == "zh" else "en"
