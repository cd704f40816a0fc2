"""What storage says of all memories: read by the `Catalog` when it starts, after however its predecessor ended."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.storage.durable import DamagedFile
from memory_worker.manifest import Manifest, MemoryKey
from memory_worker.messages import FailedChange, Job, MemoryRecord
from memory_worker.storage.store import MemoryStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """One memory, with its unfinished job if it has one; and the versions that may go."""

    name: tuple[str, str]  # tenant, memory
    record: MemoryRecord | None  # none: only leftovers
    manifest: Manifest | None  # of the present version
    old: tuple[MemoryKey, ...]


def restore(store: MemoryStore) -> Iterator[Restored]:
    """Every memory, deletions that were cut short finished first. One that cannot be read is failed, and says why."""
    store.sweep()
    for tenant in store.tenants():
        for memory in store.memories(tenant):
            yield _restore_memory(store, tenant, memory)


def _restore_memory(store: MemoryStore, tenant: str, memory: str) -> Restored:
    keys = [MemoryKey(tenant, memory, version) for version in store.all_versions(tenant, memory)]
    ready = {*store.versions(tenant, memory)}
    for key in keys:
        if key.version not in ready and store.finish_publishing(key):
            logger.warning("%s was being published when the catalog died: it is ready now", key.path)
            ready.add(key.version)
    published = [key for key in keys if key.version in ready]
    record, manifest = _restore_ready(store, published[-1]) if published else (None, None)
    for key in keys:
        if key.version not in ready:
            record = _add_job(store, key, record)
    needed = {record.key, record.job.key if record.job else None} if record else set()
    return Restored((tenant, memory), record, manifest, tuple(key for key in keys if key not in needed))


def _restore_ready(store: MemoryStore, key: MemoryKey) -> tuple[MemoryRecord, Manifest | None]:
    record = MemoryRecord(key.tenant, key.memory, key.version, "failed", "", 0)
    try:
        manifest = store.read_manifest(key)
    except DamagedFile as damage:
        logger.error("the memory %s cannot be read: %s", key.path, damage)
        return replace(record, error=str(damage)), None
    return replace(record, status="ready", created=manifest.created), manifest


def _add_job(store: MemoryStore, key: MemoryKey, record: MemoryRecord | None) -> MemoryRecord | None:
    """`record` with the unfinished job of `key`, if there is one that can go on."""
    made = MemoryRecord(key.tenant, key.memory, key.version, "memorizing", "", 0)
    try:
        job = store.job(key)
        if job is None or (record and job.base != record.version):
            return record  # what is left of a version that is no more, or was never begun
        error = store.failure(key)
    except DamagedFile as damage:
        logger.error("the job of %s cannot be read: %s", key.path, damage)
        return record or replace(made, status="failed", error=str(damage))
    if error is not None and record:
        return replace(record, failed_change=FailedChange(key, job.kind, error))
    if error is not None:
        return replace(made, status="failed", created=job.created, error=error)
    return replace(record or replace(made, created=job.created), job=Job(key, job))
