"""Which job is worked on next, and by whom: held by the `Catalog`, in memory alone.

At most so many jobs run at a time in the whole cluster. A tenant with fewer running jobs goes first, of equals the
one who was served longest ago, and each tenant's own jobs in the order they came: one who brings a thousand books
does not keep another from bringing one. Who works on a job holds a lease on it and renews it by reporting progress;
when the lease runs out the job is given to somebody else.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from memory_worker.errors import QueueFull
from memory_worker.manifest import MemoryKey


@dataclass(slots=True)
class _Entry:
    key: MemoryKey
    durable: bool = True  # only then it may be taken
    runner: str | None = None  # none: waiting; empty: whoever reports first
    expires: float = 0.0


class JobQueue:
    """Jobs by their version's key. `clock` is in seconds."""

    def __init__(self, running: int, waiting: int, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.configure(running, waiting, lease_s)
        self._clock = clock
        self._entries: dict[MemoryKey, _Entry] = {}  # in the order they came
        self._served: dict[str, int] = {}  # tenant: number of the last time it was served
        self._turn = 0

    def configure(self, running: int, waiting: int, lease_s: float) -> None:
        """From now on so many jobs may run and wait, and a lease lasts so many seconds."""
        self._running = running
        self._waiting = waiting
        self._lease_s = lease_s

    def add(self, key: MemoryKey, *, durable: bool = True) -> None:
        """A new job waits; nobody is given it before it is `durable`. Raises `QueueFull`."""
        self.require_room()
        self._entries[key] = _Entry(key, durable)

    def mark_durable(self, key: MemoryKey) -> None:
        """The record of an added job is written: it may be taken."""
        self._entries[key].durable = True

    def require_room(self) -> None:
        """Raises `QueueFull` if no more jobs may wait."""
        waiting = sum(entry.runner is None for entry in self._entries.values())
        if waiting >= self._waiting:
            raise QueueFull(waiting)

    def restore(self, key: MemoryKey) -> None:
        """A job from before a restart. Who worked on it may still do so, and has one lease's time to say it."""
        self._entries[key] = _Entry(key, runner="", expires=self._clock() + self._lease_s)

    def take(self, runner: str) -> MemoryKey | None:
        """The next job, now leased to `runner`; none where none waits or all that may run are running."""
        now = self._clock()
        active: dict[str, int] = {}
        for entry in self._entries.values():
            if entry.runner is not None and entry.expires <= now:
                entry.runner = None
            if entry.runner is not None:
                active[entry.key.tenant] = active.get(entry.key.tenant, 0) + 1
        waiting = [entry for entry in self._entries.values() if entry.runner is None and entry.durable]
        if not waiting or sum(active.values()) >= self._running:
            return None
        chosen = min(waiting, key=lambda e: (active.get(e.key.tenant, 0), self._served.get(e.key.tenant, 0)))
        chosen.runner, chosen.expires = runner, now + self._lease_s
        self._turn += 1
        self._served[chosen.key.tenant] = self._turn
        return chosen.key

    def renew(self, key: MemoryKey, runner: str) -> bool:
        """Prolongs the lease; false if the job is no longer this runner's."""
        entry = self._entries.get(key)
        if entry is None or entry.runner not in (runner, ""):
            return False
        entry.runner, entry.expires = runner, self._clock() + self._lease_s
        return True

    def remove(self, key: MemoryKey) -> None:
        """The job has ended, however it did."""
        self._entries.pop(key, None)

    @property
    def running(self) -> int:
        """Jobs that somebody works on."""
        return sum(entry.runner is not None for entry in self._entries.values())

    def of_tenant(self, tenant: str) -> set[MemoryKey]:
        """The tenant's jobs, waiting or running."""
        return {key for key in self._entries if key.tenant == tenant}
