"""The catalog of all tenants' memories: one detached actor that every Router asks and every job reports to.

It holds nothing that storage does not: killed at any moment, it comes back and reads the manifests and jobs
again; only the progress of running jobs starts anew. Calls that were under way are repeated by Ray, so every
method may run twice.
"""

import asyncio
import time
import weakref
from bisect import bisect_right
from dataclasses import replace
from typing import Any, Literal

import ray

from cluster.storage import DamagedFile
from memory_worker.errors import MemoryExists, MemoryNotFound, MemoryNotReady
from memory_worker.keeper import NAMESPACE
from memory_worker.manifest import JobRecord, Manifest
from memory_worker.messages import MemoryKey, MemoryRecord
from memory_worker.store import MemoryStore, check_id

_CONCURRENT_CALLS = 10_000  # every open event stream is a call that waits

_Name = tuple[str, str]  # tenant, memory
Page = tuple[list[MemoryRecord], str | None]  # and the next cursor
Jobs = list[tuple[MemoryKey, JobRecord]]


class Catalog:
    """Names to memories; create it through `catalog()`. Raises `InvalidId` for a name that cannot be one."""

    def __init__(self, storage_root: str) -> None:
        self._store = MemoryStore(storage_root)
        self._store.sweep()
        self._changed = asyncio.Condition()
        self._locks: weakref.WeakValueDictionary[_Name, asyncio.Lock] = weakref.WeakValueDictionary()
        # From the clock, so that a waiter from before a restart sees another number than it knows.
        self._revision = time.time_ns() // 1000
        self._records: dict[_Name, MemoryRecord] = {}
        for tenant in self._store.tenants():
            for memory in self._store.memories(tenant):
                self._restore(tenant, memory)

    async def begin(self, tenant: str, memory: str, job: JobRecord) -> MemoryKey:
        """Reserves the name and records the job; of several calls at once, one wins.

        Raises `MemoryExists` if the name is taken. A memory that failed before it was ever ready is replaced.
        The same job (by its id) gets the same key again.
        """
        name = check_id(tenant, "tenant"), check_id(memory, "memory")
        for document in job.documents:
            check_id(document.id, "document")
        async with self._lock(name):
            known = self._records.get(name)
            if known and known.status == "memorizing" and known.job and known.job.id == job.id:
                return known.key
            if known and known.status != "failed":
                raise MemoryExists(memory)
            key = await asyncio.to_thread(self._start, name, known, job)
            await self._set(
                name, MemoryRecord(tenant, memory, key.version, "memorizing", job.created, revision=0, job=job)
            )
            return key

    async def progress(self, key: MemoryKey, done_tokens: int, total_tokens: int) -> None:
        """Reports how far a job is. Raises `MemoryNotFound` if it was deleted: its work is in vain."""
        record = self._job_record(key)
        await self._set((key.tenant, key.memory), replace(record, done_tokens=done_tokens, total_tokens=total_tokens))

    async def publish(self, manifest: Manifest) -> None:
        """Makes a version ready: writes its manifest. Raises `MemoryNotFound` if it was deleted meanwhile."""
        name, key = (manifest.tenant, manifest.memory), _key(manifest)
        async with self._lock(name):
            known = self._records.get(name)
            if known and known.manifest == manifest:
                return
            record = self._job_record(key)
            await asyncio.to_thread(self._store.publish, manifest)
            await self._set(
                name, replace(record, status="ready", created=manifest.created, manifest=manifest, job=None)
            )

    async def fail(self, key: MemoryKey, error: str) -> None:
        """Gives a job up, durably. Raises `MemoryNotFound` if it was deleted meanwhile."""
        name = key.tenant, key.memory
        async with self._lock(name):
            known = self._records.get(name)
            if known and known.status == "failed" and known.key == key:
                return
            record = self._job_record(key)
            await asyncio.to_thread(self._store.fail, key, error)
            await self._set(name, replace(record, status="failed", error=error))

    async def get(self, tenant: str, memory: str) -> MemoryRecord:
        """The memory as it stands. Raises `MemoryNotFound`."""
        return self._get((check_id(tenant, "tenant"), check_id(memory, "memory")))

    async def ready(self, tenant: str, memory: str) -> Manifest:
        """The manifest of the memory's current version. Raises `MemoryNotFound`, `MemoryNotReady`."""
        record = await self.get(tenant, memory)
        if record.manifest is None:
            raise MemoryNotReady(memory, record.status, record.error)
        return record.manifest

    async def list(self, tenant: str, cursor: str | None = None, limit: int = 100) -> Page:
        """At most `limit` of the tenant's memories by id, after `cursor`; and the next cursor, if there are more."""
        names = sorted(name for name in self._records if name[0] == check_id(tenant, "tenant"))
        start = bisect_right(names, (tenant, cursor)) if cursor else 0
        page = names[start : start + limit]
        more = page and start + limit < len(names)
        return [self._records[name] for name in page], page[-1][1] if more else None

    async def delete(self, tenant: str, memory: str) -> None:
        """Deletes the memory, or the job that makes it, with all files. Raises `MemoryNotFound`."""
        name = check_id(tenant, "tenant"), check_id(memory, "memory")
        async with self._lock(name):
            self._get(name)
            await asyncio.to_thread(self._store.delete, tenant, memory)
            await self._set(name, None)

    async def wait(self, tenant: str, memory: str, seen_revision: int, timeout_s: float) -> MemoryRecord:
        """The memory as soon as its revision is another than `seen_revision`, or as it is after `timeout_s` seconds.

        Raises `MemoryNotFound`, also when the memory is deleted while waiting.
        """
        name = check_id(tenant, "tenant"), check_id(memory, "memory")
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._get(name).revision != seen_revision)
        except TimeoutError:
            pass
        return self._get(name)

    async def unfinished(self) -> Jobs:
        """Jobs that began and neither ended nor failed: those running, and those whose runner is gone."""
        return [(r.key, r.job) for r in self._records.values() if r.status == "memorizing" and r.job]

    def _start(self, name: _Name, failed: MemoryRecord | None, job: JobRecord) -> MemoryKey:
        key = self._store.new_version(*name)
        if failed:
            self._store.discard(failed.key)
        self._store.begin(key, job)
        return key

    def _restore(self, tenant: str, memory: str) -> None:
        """The record of a memory as storage has it. One that cannot be read is failed, and says why."""
        published = self._store.versions(tenant, memory)
        versions = published or self._store.all_versions(tenant, memory)
        if not versions:
            return
        key = MemoryKey(tenant, memory, versions[-1])
        self._revision += 1
        record = MemoryRecord(tenant, memory, key.version, "failed", "", self._revision)
        try:
            if published:
                manifest = self._store.read_manifest(key)
                record = replace(record, status="ready", created=manifest.created, manifest=manifest)
            elif job := self._store.job(key):
                error = self._store.failure(key)
                status: Literal["memorizing", "failed"] = "memorizing" if error is None else "failed"
                record = replace(record, status=status, created=job.created, job=job, error=error)
            else:
                return  # files of a job that was deleted while it ran
        except DamagedFile as damage:
            record = replace(record, error=str(damage))
        self._records[tenant, memory] = record

    def _get(self, name: _Name) -> MemoryRecord:
        if name not in self._records:
            raise MemoryNotFound(name[1])
        return self._records[name]

    def _job_record(self, key: MemoryKey) -> MemoryRecord:
        record = self._records.get((key.tenant, key.memory))
        if record is None or record.key != key or record.status != "memorizing":
            raise MemoryNotFound(key.memory)
        return record

    async def _set(self, name: _Name, record: MemoryRecord | None) -> None:
        self._revision += 1
        if record is None:
            del self._records[name]
        else:
            self._records[name] = replace(record, revision=self._revision)
        async with self._changed:
            self._changed.notify_all()

    def _lock(self, name: _Name) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def catalog(storage_root: str, namespace: str = NAMESPACE) -> "ray.actor.ActorHandle":
    """The cluster's catalog, started if there is none; all who use one namespace share it."""
    actor: Any = ray.remote(Catalog)
    return actor.options(
        name="memory-catalog",
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=_CONCURRENT_CALLS,
    ).remote(storage_root)


def _key(manifest: Manifest) -> MemoryKey:
    return MemoryKey(manifest.tenant, manifest.memory, manifest.version)
