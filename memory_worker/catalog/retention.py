"""Which versions may be deleted, and when: held by the `Catalog`, in memory alone.

A version is kept while it is the memory's present one or is being made, and after that for a grace that begins
anew whenever it is read. A question must take less than the grace (the Router's deadline sees to that), so that no
version goes under a reader. After a restart every old version counts as just replaced.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from memory_worker.errors import DamagedMemory
from memory_worker.manifest import MemoryKey
from memory_worker.storage.store import MemoryStore

logger = logging.getLogger(__name__)

_RESERVED_S = 24 * 3600.0  # an upload may take so long
_COUNTED_S = 600.0  # a reservation counts against quotas for so long: whoever made it may have died


class Retention:
    """Old versions, and reservations that were never used. `clock` is in seconds."""

    def __init__(self, store: MemoryStore, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self.grace_s = grace_s
        self._clock = clock
        self._old: dict[MemoryKey, float] = {}  # since when it is not needed
        self._read: dict[MemoryKey, float] = {}  # when it was last handed to a reader
        self._reserved: dict[MemoryKey, float] = {}
        self.reads = 0  # times a version was handed to a reader

    def reserve(self, key: MemoryKey) -> None:
        """Texts will be put into a version that has no job yet."""
        self._reserved[key] = self._clock()

    def release(self, key: MemoryKey) -> None:
        """The reservation has become a job, or was given up."""
        self._reserved.pop(key, None)

    def reserved(self, tenant: str) -> set[MemoryKey]:
        """The tenant's reservations of late."""
        since = self._clock() - _COUNTED_S
        return {key for key, when in self._reserved.items() if key.tenant == tenant and when >= since}

    def read(self, key: MemoryKey) -> None:
        """The version was handed to a reader."""
        self._read[key] = self._clock()
        self.reads += 1

    def mark_replaced(self, key: MemoryKey) -> None:
        """The version is not needed any more, readers apart."""
        self._old[key] = self._clock()

    def forget(self, tenant: str, memory: str) -> None:
        """The memory is deleted."""
        for times in (self._old, self._read, self._reserved):
            for key in [key for key in times if (key.tenant, key.memory) == (tenant, memory)]:
                del times[key]

    def due(self) -> list[tuple[str, str]]:
        """Tenant and id of the memories of which something can be deleted now."""
        now = self._clock()
        for key, since in list(self._reserved.items()):
            if since + _RESERVED_S <= now:
                self._old[key] = self._reserved.pop(key)
        return sorted({(key.tenant, key.memory) for key in self._old if self._over(key, now)})

    async def collect(self, name: tuple[str, str], present: set[str]) -> None:
        """Deletes what is due of one memory, whose `present` versions are needed."""
        now = self._clock()
        tenant, memory = name
        mine = [key for key in self._old if (key.tenant, key.memory) == name]
        waiting = {key.version for key in mine if not self._over(key, now)}
        waiting |= {key.version for key in self._reserved if (key.tenant, key.memory) == name}
        try:
            gone = await asyncio.to_thread(self._store.collect, tenant, memory, present | waiting)
        except (DamagedMemory, OSError) as error:
            logger.error("old versions of %s/%s could not be deleted: %s", tenant, memory, error)
            for key in mine:
                self._old[key] = now  # tried again after another grace
            return
        for key in mine:
            if key.version not in waiting:
                del self._old[key]
                self._read.pop(key, None)
        if gone:
            logger.info("deleted %d old versions of %s/%s", len(gone), tenant, memory)

    def _over(self, key: MemoryKey, now: float) -> bool:
        return max(self._old[key], self._read.get(key, self._old[key])) + self.grace_s <= now
