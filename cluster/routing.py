"""Routes a request for a memory to the replica that already holds it: for the handles of the Recaller.

`MemoryRouting` is the policy: plain numbers in, a choice out. `cluster.ray_internals.MemoryRouter` applies it inside
Ray Serve, and `ReportsRank` is what a deployment adds so that the routers know its replicas by rank.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from ray import serve
from ray.serve.config import RequestRouterConfig

_SEED = b"memorag routing"  # part of the contract between routers: another seed moves every memory of a running fleet
_CACHED_ORDERS = 4096
_RANK = "rank"  # the key of what a replica reports
_RANKS_EVERY_S = 5.0  # how soon routers follow when Serve renumbers

_Words = npt.NDArray[np.uint64]


class MemoryRouting:
    """Which of the replicas a memory's request goes to.

    **Rendezvous hashing** (highest random weight, Thaler and Ravishankar 1998): each pair of memory and replica
    has a pseudo-random score, and the memory's replicas, best score first, are its order. Its home is the first.
    A replica that leaves takes only its own memories with it, each to the next in its own order, and one that joins
    takes only those that it now scores best; with n replicas that is 1/n of them, the least possible. A ring does that
    only roughly, with a hundred virtual nodes for each replica, and hands a lost replica's memories to few others;
    here there is no state to build, and shares are even to within chance. Scoring all replicas is O(n), which for
    256 of them takes 30 µs once per memory: the order is cached.

    **Ranks, not replica ids**, are what is hashed. Serve gives a replica that replaces a dead one a new id but the
    rank that became free, so a restarted replica gets its memories back, and nobody else's move: not when it
    dies and not when it returns. The price: when the number of replicas shrinks Serve renumbers the last ones to fill
    the holes, and up to 2/n of the memories move instead of 1/n.

    **Bounded load** (Mirrokni, Thorup and Zadimoghaddam 2018): a request takes the first replica of the order
    whose ongoing requests, this one included, stay within `load_factor` × the mean, rounded up (or within `unhurried`,
    while there is hardly any load). There always is one: the least loaded is never above the mean. So a **hot
    memory** spreads over exactly as many replicas as its load needs, always the first ones of its order that have room,
    and draws back to its home as the load falls. That is all it takes: counting each memory's requests to give it a
    number of replicas of its own was simulated, and gained about a hundredth in hits for state that routers would not
    agree on.

    The hash is BLAKE2b of the memory with a fixed seed, mixed with the rank by SplitMix64: the same in every process,
    unlike Python's `hash`, so routers agree without talking. They agree even on where a memory overflows to.
    """

    def __init__(self, *, load_factor: float = 1.25, unhurried: int = 4) -> None:
        """`unhurried`: ongoing requests up to which a replica is never passed over, however idle the others are.

        The bound alone (1) lets next to no load undo the routing: with one request under way on four replicas the bound
        is 1, so the second question on a memory would go to, and load it on, another replica; even a client that
        asks one question after another would wander, as a router learns a moment after the client that an
        answer is complete. A few requests an engine batches at no cost. From a mean of `unhurried / load_factor` on
        the bound is all that counts.
        """
        if load_factor <= 1 or unhurried < 1:
            raise ValueError(f"load_factor must be above 1 and unhurried at least 1, not {load_factor} and {unhurried}")
        self._load_factor = load_factor
        self._unhurried = unhurried
        self._weights = _weights(())
        self.order = lru_cache(_CACHED_ORDERS)(self._order)

    def set_ranks(self, ranks: Sequence[int]) -> None:
        """The replicas there are: from now on the i-th is the one with rank `ranks[i]`.

        Ranks that are equal, as they are for moments while Serve renumbers, are neighbours in every order.
        """
        self._weights = _weights(ranks)
        self.order.cache_clear()

    def bound(self, loads: Sequence[int], limit: int | None = None) -> int:
        """Ongoing requests that a replica may have once one more is placed; never more than `limit`."""
        bound = max(self._unhurried, math.ceil(self._load_factor * (sum(loads) + 1) / len(loads)))
        return bound if limit is None else min(bound, limit)

    def candidates(self, memory: str, loads: Sequence[int], limit: int | None = None) -> Iterator[int]:
        """Indices of the replicas with room for one more request for `memory`, best first.

        `loads[i]` are the ongoing requests of the i-th replica. There is at least one, unless all have `limit`.
        """
        bound = self.bound(loads, limit)
        return (index for index in self.order(memory) if loads[index] < bound)

    def _order(self, memory: str) -> list[int]:
        """Indices of all replicas, home first. `order` is this, cached."""
        digest = hashlib.blake2b(memory.encode(), digest_size=8, key=_SEED).digest()
        scores = _mix(self._weights ^ np.uint64(int.from_bytes(digest, "little")))
        order: list[int] = np.argsort(~scores, kind="stable").tolist()
        return order


def route_by_memory() -> dict[str, Any]:
    """Options of a deployment whose class is a `ReportsRank` and whose callers give `session_id`s."""
    return {
        "request_router_config": RequestRouterConfig(
            request_router_class="cluster.ray_internals.MemoryRouter", request_routing_stats_period_s=_RANKS_EVERY_S
        )
    }


class ReportsRank:
    """For a deployment's class, as its first base: tells the routers the replica's rank.

    Serve's routers are not told ranks. The metadata comes with the replica's first announcement, so no request is
    ever routed without it; the statistics, asked for every `request_routing_stats_period_s`, follow when Serve
    renumbers.
    """

    async def record_replica_metadata(self) -> dict[str, Any]:
        return {_RANK: serve.get_replica_context().rank.rank}

    async def record_routing_stats(self) -> dict[str, Any]:
        return {_RANK: serve.get_replica_context().rank.rank}


def rank_of(reported: Mapping[str, Any], replica_id: str) -> int:
    """The rank that a replica reported; a number made of its id, which ends with it, where it reports none."""
    rank = reported.get(_RANK)
    if isinstance(rank, int):
        return rank
    return int.from_bytes(hashlib.blake2b(replica_id.encode(), digest_size=8, key=_SEED).digest(), "little")


def _weights(ranks: Sequence[int]) -> _Words:
    """A word for each rank, far from those of other ranks."""
    return _mix(np.array(ranks, dtype=np.uint64))


def _mix(words: _Words) -> _Words:
    """SplitMix64's step: each bit of a word depends on all of its bits before."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
