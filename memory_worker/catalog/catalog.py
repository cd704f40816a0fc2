"""The catalog of all tenants' memories: one detached actor that every Router asks and every job reports to.

It holds nothing that storage does not: killed at any moment, it comes back and reads the manifests and jobs
again; only the progress of running jobs starts anew. Calls that were under way are repeated by Ray, so every
method may run twice.

A memory changes one change at a time: `reserve` says where the texts of the new version go, `begin` makes its job
durable, whoever `take`s the job publishes the new version, or fails it. Until then readers see the version before.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from cluster.storage.durable import StorageFull
from memory_worker.catalog.job_queue import JobQueue
from memory_worker.catalog.quotas import QuotasConfig, require
from memory_worker.catalog.rates import RateLimiter
from memory_worker.catalog.records import Name, Page, Records
from memory_worker.catalog.restore import restore
from memory_worker.catalog.retention import Retention
from memory_worker.config import CatalogConfig
from memory_worker.errors import (
    DocumentNotFound,
    JobEnded,
    JobUnderWay,
    LastDocument,
    MemoryExists,
    MemoryNotFound,
    MemoryNotReady,
    NoJob,
    QueueFull,
    VersionChanged,
)
from memory_worker.manifest import Document, JobRecord, Manifest, MemoryKey, now
from memory_worker.messages import CatalogTotals, FailedChange, Job, MemoryRecord, ReadLease, Reservation, TenantUsage
from memory_worker.storage.store import MemoryStore, check_id

logger = logging.getLogger(__name__)


class Catalog:
    """Names to memories; `memory_worker.catalog.actor` makes it. Raises `InvalidId` for a name that cannot be one."""

    def __init__(
        self, storage_root: str, config: CatalogConfig | None = None, quotas: QuotasConfig | None = None
    ) -> None:
        self._config = config or CatalogConfig()
        self._quotas = quotas or QuotasConfig()
        self._store = MemoryStore(storage_root)
        self._records = Records()
        self._queue = JobQueue(self._config.running_jobs, self._config.waiting_jobs, self._config.lease_s)
        self._rates = RateLimiter()
        self._retention = Retention(self._store, self._config.grace_s)
        self._collecting: asyncio.Task[None] | None = None
        for restored in restore(self._store):
            for key in restored.old:
                self._retention.mark_replaced(key)
            if restored.record:
                self._records.put(restored.record, restored.manifest)
            if restored.record and restored.record.job:
                self._queue.restore(restored.record.job.key)

    # -- making and changing memories ----------------------------------------------------------------------

    async def reserve(self, tenant: str, memory: str, *, create: bool, if_match: str | None = None) -> Reservation:
        """A version to put texts into, new or on top of the present one; `begin` makes it a job.

        Raises `MemoryExists`, `MemoryNotFound`, `MemoryNotReady`, `JobUnderWay`, `QueueFull`, `QuotaExceeded`, or
        `VersionChanged` if the present version is not `if_match`.
        """
        name = _check_name(tenant, memory)
        async with self._records.lock(name):
            base = self._base(name, create, if_match)
            key = await asyncio.to_thread(self._store.new_version, *name)
            # Nothing is awaited from here on, so that of many at once each counts those before it.
            self._queue.require_room()
            self._require_quota(name, self._queue.of_tenant(tenant) | self._retention.reserved(tenant))
            self._retention.reserve(key)
            return Reservation(key, base)

    async def begin(self, key: MemoryKey, job: JobRecord) -> MemoryRecord:
        """Records the job, whose texts are durable; of several at once, one wins. A memory that failed is replaced.

        Raises as `reserve`, and leaves nothing of the job then. The same job is begun once.
        """
        name = key.tenant, key.memory
        async with self._records.lock(name):
            known = self._records.get(name)
            if known and (known.key == key or (known.job and known.job.key == key)):
                return known
            base = self._base(name, job.kind == "create", job.base)
            if job.kind != "repair":
                self._require_quota(name, self._queue.of_tenant(key.tenant))
            self._queue.add(key, durable=False)  # its place is taken first, so that nothing durable is refused
            try:
                await asyncio.to_thread(self._store.begin, key, job)
            except BaseException:
                self._queue.remove(key)
                raise
            if known and base is None:
                await self._discard(known.key)
            self._retention.release(key)
            self._queue.mark_durable(key)
            started = Job(key, job)
            if base is None or known is None:
                record = MemoryRecord(*name, key.version, "memorizing", job.created, 0, job=started)
            else:
                record = replace(known, job=started)
            return await self._records.update(record)

    async def adopt(self, manifest: Manifest) -> MemoryRecord:
        """Makes a memory of files that are all there already, such as those of an archive. Raises as `reserve`."""
        name, key = (manifest.tenant, manifest.memory), manifest.key
        async with self._records.lock(name):
            known = self._records.get(name)
            if known and self._records.manifest(name) == manifest:
                return known
            self._base(name, True, None)
            self._require_quota(name, self._queue.of_tenant(key.tenant))
            with self._records.coming(manifest):
                quota, usage = self._quotas.of(key.tenant), self._records.usage(key.tenant)
                require("tokens", quota.tokens, usage.tokens)
                require("bytes", quota.bytes, usage.bytes)
                record = await self._mark_published(manifest)
            self._retention.release(key)
            return record

    async def abandon(self, key: MemoryKey) -> None:
        """Gives a reservation up, with the texts put into it."""
        async with self._records.lock((key.tenant, key.memory)):
            record = self._records.get((key.tenant, key.memory))
            if record is None or (record.key != key and (record.job is None or record.job.key != key)):
                await asyncio.to_thread(self._store.discard, key)
            self._retention.release(key)

    async def remove_document(
        self, tenant: str, memory: str, document: str, if_match: str | None = None, request: str | None = None
    ) -> MemoryRecord:
        """A new version without the document, there at once. A `request` that is made again finds it done.

        Raises `DocumentNotFound`, `LastDocument`, and as `reserve`.
        """
        name = _check_name(tenant, memory)
        async with self._records.lock(name):
            record = self._records.of(name)
            made = await asyncio.to_thread(self._store.version_of, tenant, memory, request) if request else None
            if made:
                return record
            self._base(name, False, if_match)
            base = self._records.manifest(name)
            assert base is not None, "a change has a base"
            left = tuple(entry for entry in base.documents if entry.id != document)
            if left == base.documents:
                raise DocumentNotFound(memory, document, tuple(entry.id for entry in base.documents))
            if not left:
                raise LastDocument(memory, document)
            key = await asyncio.to_thread(self._store.new_version, tenant, memory, request)
            manifest = base.model_copy(
                update={"version": key.version, "parent": base.version, "created": now(), "documents": left}
            )
            return await self._mark_published(manifest)

    async def repair(self, key: MemoryKey, path: str) -> bool:
        """Begins to make the documents again that the damaged file `path` belongs to, as a new version.

        Returns false where nothing can be done: the file is of no document, or is the text itself; or nothing now,
        because the queue or the disk is full. True also where a newer version or a job is there already.
        """
        name = key.tenant, key.memory
        record, manifest = self._records.get(name), self._records.manifest(name)
        if record is None or manifest is None:
            return False
        if record.key != key or record.job:
            return True
        of_head = path == manifest.head.path
        damaged = [d for d in manifest.documents if of_head or path in {f.path for f in d.files}]
        if not damaged or any(path == document.source.path for document in damaged):
            return False
        job = JobRecord(
            kind="repair",
            base=manifest.version,
            documents=tuple(Document(id=d.id, characters=d.characters, source=d.source) for d in damaged),
            memory_kind=manifest.kind,
            ratio=manifest.ratio,
            language=manifest.language,
            title=manifest.title,
            tags=manifest.tags,
        )
        logger.error("%s is damaged: %s of %s is made again", path, ", ".join(d.id for d in damaged), key.path)
        try:
            await self.begin(await asyncio.to_thread(self._store.new_version, *name), job)
        except (VersionChanged, JobUnderWay):
            return True  # somebody was faster
        except (QueueFull, StorageFull) as refusal:
            logger.error("%s is not made again now, but when it is asked for once more: %s", path, refusal)
            return False
        return True

    async def cancel(self, key: MemoryKey) -> None:
        """Ends the job that makes this version: a new memory has failed then, a ready one stays as it is.

        One that has failed already is left at that. Raises `NoJob` where the job's version is ready, or there is none.
        """
        try:
            await self.fail(key, "it was cancelled")
        except JobEnded:
            if await asyncio.to_thread(self._store.failure, key) is None:
                raise NoJob(key.memory) from None

    async def delete(self, tenant: str, memory: str, request: str | None = None) -> None:
        """Deletes the memory, or the job that makes it, with all files. A `request` that is made again finds it done.

        Raises `MemoryNotFound`.
        """
        name = _check_name(tenant, memory)
        async with self._records.lock(name):
            if request is not None and await asyncio.to_thread(self._store.was_deleted_by, tenant, request):
                return
            record = self._records.of(name)
            self._retention.forget(*name)
            if record.job:
                self._queue.remove(record.job.key)
                self._retention.mark_replaced(record.job.key)  # its worker may write a file more before it is told
            await asyncio.to_thread(self._store.delete, tenant, memory, request)
            await self._records.remove(name)

    # -- doing jobs ----------------------------------------------------------------------------------------

    async def take(
        self, runner: str, timeout_s: float, settings: tuple[CatalogConfig, QuotasConfig] | None = None
    ) -> Job | None:
        """The next job for `runner`, who has to report `progress`; none after `timeout_s` seconds without one.

        The runner brings the settings of its deployment: this actor outlives deployments, and starts again with
        those it was first made with.
        """
        if settings is not None and settings != (self._config, self._quotas):
            self._config, self._quotas = settings
            self._queue.configure(self._config.running_jobs, self._config.waiting_jobs, self._config.lease_s)
            self._retention.grace_s = self._config.grace_s
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.create_task(self._collect())
        deadline = time.monotonic() + timeout_s
        while True:
            if (key := self._queue.take(runner)) is not None:
                record = self._records.of((key.tenant, key.memory))
                assert record.job is not None, "the queue holds keys of jobs"
                job = replace(record.job, state="running")
                await self._records.update(replace(record, job=job))
                return job
            # A lease that runs out wakes nobody, so it is looked for.
            left = min(deadline - time.monotonic(), self._config.lease_s / 4)
            if left <= 0:
                return None
            await self._records.change(left)

    async def progress(self, key: MemoryKey, runner: str, done_tokens: int, total_tokens: int) -> None:
        """Reports how far a job is, and keeps it. Raises `JobEnded`, or `QuotaExceeded` once it is known how long."""
        name = key.tenant, key.memory
        record = self._records.get(name)
        if record is None or record.job is None or record.job.key != key or not self._queue.renew(key, runner):
            raise JobEnded(key.memory)
        others = self._records.usage(key.tenant, without=record.job).tokens
        require("tokens", self._quotas.of(key.tenant).tokens, others + total_tokens)
        job = replace(record.job, state="running", done_tokens=done_tokens, total_tokens=total_tokens)
        await self._records.update(replace(record, job=job))

    async def publish(self, manifest: Manifest) -> MemoryRecord:
        """Makes the version of a job ready: writes its manifest. Raises `JobEnded` if it was cancelled meanwhile."""
        name, key = (manifest.tenant, manifest.memory), manifest.key
        async with self._records.lock(name):
            known = self._records.get(name)
            if known and self._records.manifest(name) == manifest:
                return known
            if known is None or known.job is None or known.job.key != key:
                raise JobEnded(manifest.memory)
            with self._records.coming(manifest):
                require("bytes", self._quotas.of(key.tenant).bytes, self._records.usage(key.tenant).bytes)
                return await self._mark_published(manifest)

    async def fail(self, key: MemoryKey, error: str) -> None:
        """Gives a job up. Raises `JobEnded` if it was ended meanwhile."""
        name = key.tenant, key.memory
        async with self._records.lock(name):
            known = self._records.get(name)
            if known is None or known.job is None or known.job.key != key:
                raise JobEnded(key.memory)
            self._queue.remove(key)
            self._retention.mark_replaced(key)
            if known.status == "ready":
                failed = FailedChange(key, known.job.record.kind, error)
                await self._records.update(replace(known, job=None, failed_change=failed))
            else:
                await self._records.update(replace(known, status="failed", job=None, error=error))
            try:
                await asyncio.to_thread(self._store.fail, key, error)
            except OSError as unwritten:  # a full disk, say: after a restart the job is tried again
                logger.error("that the job of %s failed could not be recorded: %s", key.path, unwritten)

    # -- reading -------------------------------------------------------------------------------------------

    async def get(self, tenant: str, memory: str) -> MemoryRecord:
        """The memory as it stands. Raises `MemoryNotFound`."""
        return self._records.of(_check_name(tenant, memory))

    async def read(self, tenant: str, memory: str) -> ReadLease:
        """The present version, which stays whole for at least the grace from now on.

        Raises `MemoryNotFound`, `MemoryNotReady`.
        """
        record = await self.get(tenant, memory)
        if record.status != "ready":
            raise MemoryNotReady(memory, record.status, record.error)
        self._retention.read(record.key)
        return ReadLease(record.key, self._retention.grace_s)

    async def restore_manifest(self, key: MemoryKey) -> Manifest:
        """The manifest of a present version, for a reader who did not find it whole in storage; written there again.

        Raises `MemoryNotFound` where the version is not the present one any more.
        """
        name = key.tenant, key.memory
        async with self._records.lock(name):
            record, manifest = self._records.of(name), self._records.manifest(name)
            if manifest is None or record.key != key:
                raise MemoryNotFound(key.memory)
            logger.error("the manifest of %s was not read whole: it is written again", key.path)
            try:
                await asyncio.to_thread(self._store.restore_manifest, manifest)
            except OSError as unwritten:  # a full disk, say: the next reader asks again
                logger.error("the manifest of %s could not be written: %s", key.path, unwritten)
            return manifest

    async def hold(self, key: MemoryKey) -> None:
        """Somebody reads this version still: it stays whole for another grace."""
        self._retention.read(key)

    async def read_many(self, tenant: str, memories: Sequence[str], tag: str | None = None) -> list[ReadLease]:
        """As `read`, of these memories and of all ready ones with the tag, by id, each once."""
        named = dict.fromkeys(memories)
        if tag is not None:
            tagged, _ = self._records.page(tenant, None, None, tag)
            named |= dict.fromkeys(record.memory for record in tagged if record.status == "ready")
        return [await self.read(tenant, memory) for memory in named]

    async def list(self, tenant: str, cursor: str | None = None, limit: int = 100, tag: str | None = None) -> Page:
        """At most `limit` of the tenant's memories by id, after `cursor`; and the next cursor, if there are more."""
        return self._records.page(tenant, cursor, limit, tag)

    async def wait(self, tenant: str, memory: str, seen_revision: int, timeout_s: float) -> MemoryRecord:
        """The memory as soon as its revision is another than `seen_revision`, or as it is after `timeout_s` seconds.

        Raises `MemoryNotFound`, also when the memory is deleted while waiting.
        """
        name = _check_name(tenant, memory)
        return await self._records.wait(name, seen_revision, timeout_s)

    async def usage(self, tenant: str) -> TenantUsage:
        """What the tenant has."""
        return self._records.usage(tenant)

    async def totals(self) -> CatalogTotals:
        """What all tenants have together, and what was done since this actor started."""
        return self._records.totals(self._queue.running, self._retention.reads)

    async def grant(self, tenant: str, wanted: int) -> tuple[int, float]:
        """How many of `wanted` requests the tenant may make now, and seconds until it may make another."""
        per_minute = self._quotas.of(tenant).requests_per_minute
        return self._rates.grant(tenant, per_minute, wanted) if per_minute else (wanted, 0.0)

    # -- inside --------------------------------------------------------------------------------------------

    def _require_quota(self, name: Name, jobs: set[MemoryKey]) -> None:
        """Raises `QuotaExceeded` if a job of this memory is one too many beside these others of the tenant."""
        tenant, memory = name
        quota, usage = self._quotas.of(tenant), self._records.usage(tenant)
        require("jobs at a time", quota.jobs, len(jobs) + 1)
        memories = self._records.memories(tenant) | {key.memory for key in jobs} | {memory}
        require("memories", quota.memories, len(memories))
        require("tokens", quota.tokens, usage.tokens)
        require("bytes", quota.bytes, usage.bytes)

    def _base(self, name: Name, create: bool, expected: str | None) -> MemoryKey | None:
        """The version that a change starts from; raises as `reserve` says."""
        record = self._records.get(name)
        if create:
            if record and record.status != "failed":
                raise MemoryExists(name[1])
            return None
        record = self._records.of(name)
        if record.status != "ready":
            raise MemoryNotReady(name[1], record.status, record.error)
        if expected is not None and expected != record.version:
            raise VersionChanged(name[1], expected, record.version)
        if record.job:
            raise JobUnderWay(name[1])
        return record.key

    async def _discard(self, key: MemoryKey) -> None:
        """Deletes a version that was never ready, or leaves it to be collected."""
        try:
            await asyncio.to_thread(self._store.discard, key)
        except OSError as error:
            logger.error("%s is left for later: %s", key.path, error)
            self._retention.mark_replaced(key)

    async def _mark_published(self, manifest: Manifest) -> MemoryRecord:
        name, key = (manifest.tenant, manifest.memory), manifest.key
        known = self._records.get(name)
        await asyncio.to_thread(self._store.publish, manifest)
        self._queue.remove(key)
        if known and known.key != key:
            self._retention.mark_replaced(known.key)
        return await self._records.update(MemoryRecord(*name, key.version, "ready", manifest.created, 0), manifest)

    async def _collect(self) -> None:
        """Deletes versions that nobody needs, for as long as the actor lives."""
        while True:
            await asyncio.sleep(max(1.0, min(60.0, self._config.grace_s / 4)))
            for name in self._retention.due():
                async with self._records.lock(name):
                    record = self._records.get(name)
                    kept = {record.version, record.job.key.version if record.job else ""} if record else set()
                    await self._retention.collect(name, kept)


def _check_name(tenant: str, memory: str) -> Name:
    return check_id(tenant, "tenant"), check_id(memory, "memory")
