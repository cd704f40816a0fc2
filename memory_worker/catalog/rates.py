"""How many requests tenants may make: counted by the `Catalog`, for the whole cluster."""

import math
import time
from collections.abc import Callable

_ROUNDING = 1e-9  # permits: a request exactly when one comes free again is not too early


class RateLimiter:
    """A token bucket for each tenant: a minute's worth, refilled evenly. One object counts for the whole cluster.

    Over any T seconds it grants a tenant at most `per_minute * (1 + T / 60)` permits, whatever other tenants take.
    Where the clock goes backwards nothing is refilled, and counting goes on from there. A new object (its actor was
    restarted) starts with full buckets.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # by tenant: permits left, and when

    def grant(self, tenant: str, per_minute: int, wanted: int) -> tuple[int, float]:
        """How many of `wanted` permits are granted, and if none is, after how many seconds one can be."""
        now = self._clock()
        left, then = self._buckets.get(tenant, (float(per_minute), now))
        left = min(float(per_minute), left + max(0.0, now - then) * per_minute / 60)
        granted = min(wanted, math.floor(left + _ROUNDING))
        self._buckets[tenant] = max(0.0, left - granted), now
        return granted, 0.0 if granted else (1 - left) * 60 / per_minute
