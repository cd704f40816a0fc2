"""The records of all memories, with the manifests of their present versions: held by the `Catalog`, in memory alone.

Records go to whoever asks and are small; manifests stay here, for sizes and tags to be known without reading storage.
"""

import asyncio
import time
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from memory_worker.errors import MemoryNotFound
from memory_worker.manifest import Manifest
from memory_worker.messages import CatalogTotals, Job, MemoryRecord, TenantUsage

Name = tuple[str, str]  # tenant, memory
Page = tuple[list[MemoryRecord], str | None]  # and the next cursor


class Records:
    """Names to records. Every change gives a record another revision."""

    def __init__(self) -> None:
        self._records: dict[Name, MemoryRecord] = {}
        self._manifests: dict[Name, Manifest] = {}  # of the memories that are ready
        self._coming: dict[Name, Manifest] = {}  # of versions that are being published
        self._locks: weakref.WeakValueDictionary[Name, asyncio.Lock] = weakref.WeakValueDictionary()
        self._changed = asyncio.Condition()
        # From the clock, so that a waiter from before a restart sees another number than it knows.
        self._revision = time.time_ns() // 1000

    def lock(self, name: Name) -> asyncio.Lock:
        """Held by whoever changes this memory."""
        return self._locks.setdefault(name, asyncio.Lock())

    def get(self, name: Name) -> MemoryRecord | None:
        return self._records.get(name)

    def of(self, name: Name) -> MemoryRecord:
        """Raises `MemoryNotFound`."""
        if name not in self._records:
            raise MemoryNotFound(name[1])
        return self._records[name]

    def manifest(self, name: Name) -> Manifest | None:
        """Of the memory's present version; none where none is ready."""
        return self._manifests.get(name)

    def put(self, record: MemoryRecord, manifest: Manifest | None = None) -> MemoryRecord:
        """Sets the record where nobody can be waiting yet; the manifest only where its version is another now."""
        self._revision += 1
        name = record.tenant, record.memory
        self._records[name] = record = replace(record, revision=self._revision)
        if manifest is not None:
            self._manifests[name] = manifest
        return record

    async def update(self, record: MemoryRecord, manifest: Manifest | None = None) -> MemoryRecord:
        """As `put`, and wakes all who wait; returns what is there now."""
        record = self.put(record, manifest)
        await self._wake()
        return record

    async def remove(self, name: Name) -> None:
        """The memory is no more."""
        del self._records[name]
        self._manifests.pop(name, None)
        await self._wake()

    @contextmanager
    def coming(self, manifest: Manifest) -> Iterator[None]:
        """While the manifest is being written, `usage` counts the version as if it were there."""
        name = manifest.tenant, manifest.memory
        self._coming[name] = manifest
        try:
            yield
        finally:
            del self._coming[name]

    async def change(self, timeout_s: float) -> None:
        """Returns after the next change of any record, or after `timeout_s` seconds."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except TimeoutError:
                return

    async def wait(self, name: Name, seen_revision: int, timeout_s: float) -> MemoryRecord:
        """The record as soon as its revision is another than `seen_revision`, or as it is after `timeout_s` seconds.

        Raises `MemoryNotFound`, also when the memory is deleted while waiting.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.of(name).revision != seen_revision)
        except TimeoutError:
            return self.of(name)
        return self.of(name)

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def page(self, tenant: str, cursor: str | None, limit: int | None, tag: str | None) -> Page:
        """At most `limit` of the tenant's records by id, after `cursor`; and the next cursor, if there are more."""
        names = sorted(name for name in self._records if name[0] == tenant and (not tag or tag in self._tags(name)))
        start = bisect_right(names, (tenant, cursor)) if cursor else 0
        page = names[start : start + limit] if limit is not None else names[start:]
        more = page and start + len(page) < len(names)
        return [self._records[name] for name in page], page[-1][1] if more else None

    def memories(self, tenant: str) -> set[str]:
        """Ids of the tenant's memories, whatever their state."""
        return {memory for owner, memory in self._records if owner == tenant}

    def usage(self, tenant: str, without: Job | None = None) -> TenantUsage:
        """What the tenant has, `without` one of its jobs."""
        manifests = {**self._manifests, **self._coming}
        ready = [manifest for (owner, _), manifest in manifests.items() if owner == tenant]
        jobs = [
            record.job
            for (owner, memory), record in self._records.items()
            if owner == tenant and record.job and record.job is not without and (owner, memory) not in self._coming
        ]
        return TenantUsage(
            memories=len(self.memories(tenant)),
            tokens=sum(manifest.tokens for manifest in ready) + sum(job.total_tokens for job in jobs),
            bytes=sum(manifest.bytes for manifest in ready),
            jobs=len(jobs),
        )

    def totals(self, running: int, reads: int) -> CatalogTotals:
        """What there is of all tenants; `running` of the jobs are worked on."""
        jobs = [record.job for record in self._records.values() if record.job]
        ready = self._manifests.values()
        return CatalogTotals(
            memories=len(ready),
            slots=sum(manifest.slots for manifest in ready),
            tokens=sum(manifest.tokens for manifest in ready),
            running_jobs=running,
            waiting_jobs=len(jobs) - running,
            job_tokens=sum(job.total_tokens for job in jobs),
            done_tokens=sum(job.done_tokens for job in jobs),
            reads=reads,
        )

    def _tags(self, name: Name) -> tuple[str, ...]:
        if name in self._manifests:
            return self._manifests[name].tags
        job = self._records[name].job
        return job.record.tags if job else ()
