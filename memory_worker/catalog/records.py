"""The records of all memories, and who waits for a change of one: held by the `Catalog`, in memory alone."""

import asyncio
import time
import weakref
from bisect import bisect_right
from dataclasses import replace

from memory_worker.errors import MemoryNotFound
from memory_worker.messages import CatalogTotals, Job, MemoryRecord, TenantUsage

Name = tuple[str, str]  # tenant, memory
Page = tuple[list[MemoryRecord], str | None]  # and the next cursor


class Records:
    """Names to records. Every change gives a record another revision."""

    def __init__(self) -> None:
        self._records: dict[Name, MemoryRecord] = {}
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

    def put(self, record: MemoryRecord) -> MemoryRecord:
        """Sets the record where nobody can be waiting yet."""
        self._revision += 1
        name = record.tenant, record.memory
        self._records[name] = record = replace(record, revision=self._revision)
        return record

    async def set(self, name: Name, record: MemoryRecord | None) -> MemoryRecord:
        """Sets or removes the record, and wakes all who wait; returns what is there now, or was."""
        record = self._records.pop(name) if record is None else self.put(record)
        async with self._changed:
            self._changed.notify_all()
        return record

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

    def page(self, tenant: str, cursor: str | None, limit: int | None, tag: str | None) -> Page:
        """At most `limit` of the tenant's records by id, after `cursor`; and the next cursor, if there are more."""
        names = sorted(
            name for name, record in self._records.items() if name[0] == tenant and (not tag or tag in _tags(record))
        )
        start = bisect_right(names, (tenant, cursor)) if cursor else 0
        page = names[start : start + limit] if limit is not None else names[start:]
        more = page and start + len(page) < len(names)
        return [self._records[name] for name in page], page[-1][1] if more else None

    def usage(self, tenant: str, without: Job | None = None) -> TenantUsage:
        """What the tenant has, `without` one of its jobs."""
        records = [record for (owner, _), record in self._records.items() if owner == tenant]
        ready = [record.manifest for record in records if record.manifest]
        jobs = [record.job for record in records if record.job and record.job is not without]
        return TenantUsage(
            memories=len(records),
            tokens=sum(manifest.tokens for manifest in ready) + sum(job.total_tokens for job in jobs),
            bytes=sum(manifest.bytes for manifest in ready),
            jobs=len(jobs),
        )

    def totals(self, running: int, reads: int) -> CatalogTotals:
        """What there is of all tenants; `running` of the jobs are worked on."""
        records = self._records.values()
        jobs = [record.job for record in records if record.job]
        ready = [record.manifest for record in records if record.manifest]
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


def _tags(record: MemoryRecord) -> tuple[str, ...]:
    if record.manifest:
        return record.manifest.tags
    return record.job.record.tags if record.job else ()
