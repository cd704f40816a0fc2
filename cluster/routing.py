"""Routes a request for a memory to the replica that already holds it: for the handles of the Recaller.

`MemoryRouting` is the policy: plain numbers in, a choice out. `MemoryRouter` applies it inside Ray Serve, and
`ReportsRank` is what a deployment adds so that the routers know its replicas by rank.
"""

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from ray import serve
from ray.serve._private.common import ReplicaID, RequestMetadata
from ray.serve._private.request_router import PendingRequest, PowerOfTwoChoicesRequestRouter, RunningReplica
from ray.serve.config import RequestRouterConfig

_SEED = b"memorag routing"  # part of the contract between routers: another seed moves every memory of a running fleet
_CACHED_ORDERS = 4096
_ASKED_WHEN_FULL = 3  # replicas of a memory's order, as many as Serve's own hash router tries
_RANK = "rank"

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
            request_router_class="cluster.routing.MemoryRouter", request_routing_stats_period_s=_RANKS_EVERY_S
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


class MemoryRouter(PowerOfTwoChoicesRequestRouter):
    """Serve's request router by memory: `handle.options(session_id=<memory version>)` names the memory.

    Requests without a session id go to the less loaded of two random replicas, as they do by default. A replica that
    is full (`max_ongoing_requests`) is passed over; if all are, the request waits and is tried again, as Serve does.

    Each handle has a router of its own. What it knows of a replica's load is the greater of two numbers: the requests
    it has there itself, counted exactly, and Serve's queue length cache, which holds what the replica said last
    and so the other routers' requests too. The cache alone forgets, in a burst, what is sent but not yet answered.

    Replicas whose deployment does not report ranks are hashed by their ids: pinned, but not over a restart.
    """

    def initialize_state(self, *, load_factor: float = 1.25, unhurried: int = 4) -> None:
        """What `request_router_kwargs` of the deployment may set: see `MemoryRouting`."""
        self._routing = MemoryRouting(load_factor=load_factor, unhurried=unhurried)
        self._ranked: list[RunningReplica] = []  # in the order that the policy counts them
        self._own: Counter[ReplicaID] = Counter()  # requests of this router, from choice to completion
        self._asked: dict[ReplicaID, asyncio.Task[Any]] = {}  # probes under way

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._rank_replicas()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._rank_replicas()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for the memory; if all are full as far as is known, the first ones of its order."""
        if pending_request is None or not pending_request.metadata.session_id or not self._ranked:
            return await super().choose_replicas(candidate_replicas, pending_request)
        pending_request.routing_context.should_backoff = True  # before it is tried again
        memory = pending_request.metadata.session_id
        loads = [self._load(replica.replica_id) for replica in self._ranked]
        limit = self._ranked[0].max_ongoing_requests
        order = self._routing.order(memory)
        chosen = next(self._routing.candidates(memory, loads, limit), None)
        if chosen is None:
            return [[self._ranked[index] for index in order[:_ASKED_WHEN_FULL]]]
        home = self._ranked[order[0]]
        if chosen != order[0] and self._own[home.replica_id] < self._routing.bound(loads, limit):
            self._ask(home)
        return [[self._ranked[chosen]]]

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        """Takes a single candidate unasked, unless it is known to be full.

        Serve would first ask a replica of which it has heard nothing for ten seconds, and go elsewhere if it does not
        answer within a tenth of a second: a busy home would lose its memories to others for that. Nothing is lost by
        not asking: a replica that is full rejects the request, says so, and the request is routed again.
        """
        if len(candidates) == 1 and self._load(candidates[0].replica_id) < candidates[0].max_ongoing_requests:
            return self._replicas.get(candidates[0].replica_id)  # none if it has died since
        return await super()._select_from_candidate_replicas(candidates, backoff_index)

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: RequestMetadata | None = None
    ) -> None:
        """Gives the replica to the very request that it was chosen for.

        Serve would look for it by its internal id. That one is shared by all calls that a replica makes while it
        answers one request, so calls for different memories would change places, and all but one could wait for ever.
        """
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                self._own[replica.replica_id] += 1
                self._record_queue_wait_time(pending)
                self._remove_pending_request_from_indices(pending)
                pending.future.set_result(replica)
                return

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        try:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        finally:
            # From here on it counts as sent, or it was cancelled after the choice.
            future = pending_request.future
            if future.done() and not future.cancelled():
                self._own[future.result().replica_id] -= 1

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._own[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        # A request that could not even be sent completes, too, without having been counted.
        self._own[replica_id] = max(0, self._own[replica_id] - 1)

    def _load(self, replica_id: ReplicaID) -> int:
        return max(self._own[replica_id], self._replica_queue_len_cache.get(replica_id) or 0)

    def _ask(self, replica: RunningReplica) -> None:
        """Learns anew the load of a home that is passed over for what other routers had there.

        Otherwise it would be news only with a response, and while it is passed over it gives none.
        """
        if replica.replica_id not in self._asked:
            task = self._event_loop.create_task(self._probe_queue_lens([replica], 0))
            task.add_done_callback(lambda _: self._asked.pop(replica.replica_id))
            self._asked[replica.replica_id] = task

    def _rank_replicas(self) -> None:
        """Takes over Serve's set of replicas, which has lost those that are known to be dead."""
        self._ranked = sorted(self._replicas.values(), key=lambda replica: replica.replica_id.unique_id)
        self._routing.set_ranks([_rank(replica) for replica in self._ranked])
        self._own = Counter({each: count for each, count in self._own.items() if each in self._replicas})


def _rank(replica: RunningReplica) -> int:
    reported = {**replica.replica_metadata, **replica.routing_stats}.get(_RANK)
    if isinstance(reported, int):
        return reported
    digest = hashlib.blake2b(replica.replica_id.unique_id.encode(), digest_size=8, key=_SEED).digest()
    return int.from_bytes(digest, "little")


def _weights(ranks: Sequence[int]) -> _Words:
    """A word for each rank, far from those of other ranks."""
    return _mix(np.array(ranks, dtype=np.uint64))


def _mix(words: _Words) -> _Words:
    """SplitMix64's step: each bit of a word depends on all of its bits before."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
