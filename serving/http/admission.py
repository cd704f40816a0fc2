"""Who is let in now, and who is to come back later: what an Ingress replica asks before it does any work.

How many requests a tenant may make is counted in one place, the Catalog (`catalog.rates`), which hands permits
out in small batches; so most requests ask nobody, and any number of replicas together keep to the rate.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from memory_worker.catalog.quotas import QuotasConfig
from serving.errors import ProblemError

PERMITS_VALID_S = 3.0
_BATCHES_PER_MINUTE = 20  # a batch is then what one replica uses in PERMITS_VALID_S at the full rate
_BUSY_RETRY_S = 1.0

# Asks the central actor: tenant and permits wanted, to permits granted and, if none were, seconds until one can be.
Grant = Callable[[str, int], Awaitable[tuple[int, float]]]


class Admission:
    """The rate of requests, as one replica holds tenants to it.

    It asks for as many permits as the tenant used lately, at most a twentieth of a minute's. Those not used within
    `PERMITS_VALID_S` are lost: counted, and not used. So over any T seconds, all replicas together admit at most
    `per_minute * (1 + (T + PERMITS_VALID_S) / 60)` requests of a tenant: a minute's worth at once, after a pause, and
    the rate from then on.

    Refused requests ask the central actor no more often than permits come free. If it cannot be asked, its exception
    is raised: nobody is let in uncounted.
    """

    def __init__(self, quotas: QuotasConfig, grant: Grant, clock: Callable[[], float] = time.monotonic) -> None:
        self._quotas = quotas
        self._grant = grant
        self._clock = clock
        self._permits: dict[str, _Permits] = {}  # by tenant; as many as have keys

    async def admit(self, tenant: str) -> None:
        """Counts one request of `tenant`. Raises `ProblemError` 429, with `retry_after` seconds, if it is too many."""
        per_minute = self._quotas.of(tenant).requests_per_minute
        if per_minute is None:
            return
        permits = self._permits.setdefault(tenant, _Permits())
        async with permits.lock:  # while one request asks, the others wait for what it brings
            now = self._clock()
            if not permits.count_left(now) and not permits.refused_for(now):
                await self._refill(tenant, permits, max(1, per_minute // _BATCHES_PER_MINUTE))
                now = self._clock()
            if permits.count_left(now):
                permits.used += 1
                return
            retry_after_s = permits.refused_for(now)
        raise _too_many(
            f"more than {per_minute:,} requests a minute; slow down, or ask the operator for more", retry_after_s
        )

    async def _refill(self, tenant: str, permits: "_Permits", most: int) -> None:
        wanted = min(most, permits.next_batch(self._clock()))
        granted, retry_after_s = await self._grant(tenant, wanted)
        permits.granted, permits.used, permits.at = granted, 0, self._clock()
        permits.refusal_s = 0.0 if granted else retry_after_s


class _Permits:
    """A tenant's last grant, on this replica."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.granted = 0
        self.used = 0
        self.at = float("-inf")  # when
        self.refusal_s = 0.0  # if nothing was granted: seconds from then until it is worth asking again

    def count_left(self, now: float) -> int:
        return self.granted - self.used if self._age(now) < PERMITS_VALID_S else 0

    def refused_for(self, now: float) -> float:
        """Seconds, from now, in which asking again is useless."""
        return max(0.0, self.refusal_s - self._age(now))

    def next_batch(self, now: float) -> int:
        """Twice as many if the last were used up in time, else as many as were used: so few are lost."""
        in_time = self._age(now) < PERMITS_VALID_S
        return max(1, 2 * self.used if in_time else self.used)

    def _age(self, now: float) -> float:
        """Infinite where time went backwards, so that nothing is kept for longer than it is good for."""
        return now - self.at if now >= self.at else math.inf


class InFlight:
    """How many questions one replica answers at a time. `async with in_flight:` around each, streaming included."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.count = 0

    async def __aenter__(self) -> None:
        """Raises `ProblemError` 429 where `limit` questions are being answered."""
        if self.count >= self._limit:
            raise _too_many(
                f"{self._limit:,} questions are being answered here, which is all that can be; try again", _BUSY_RETRY_S
            )
        self.count += 1

    async def __aexit__(self, *_: object) -> None:
        self.count -= 1


def _too_many(detail: str, retry_after_s: float) -> ProblemError:
    return ProblemError(429, detail, {"retry_after": max(1, math.ceil(retry_after_s))})
