"""All private names of Ray that the rooms use: of Serve's request routing, its key-value store, and `ray.serve.llm`.

Nowhere else is one imported, and `tests/cluster/test_internals.py` fails by name for each that another version of Ray
lacks. Importing this imports Ray Serve, but not vLLM.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from ray._private import node, services, utils
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list, _internal_kv_put
from ray.serve._private import api, client
from ray.serve._private.common import RequestMetadata
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from cluster.routing import MemoryRouting, rank_of

_NODE_TICK_S = 0.1
_PROXIES_S = 24 * 3600.0
_ASKED_WHEN_FULL = 3  # replicas of a memory's order, as many as Serve's own hash router tries
_RANKS = "memorag-rank/"  # a key's beginning; then the group, the rank, and the node


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
    return rank_of({**replica.replica_metadata, **replica.routing_stats}, replica.replica_id.unique_id)


def announce_rank(group: str, rank: int, node_id: str) -> None:
    """Tells the cluster on which node the replica with that rank runs, of the deployment that `group` names."""
    _internal_kv_del(f"{_RANKS}{group}/{rank}/", del_by_prefix=True)  # where it ran before
    _internal_kv_put(f"{_RANKS}{group}/{rank}/{node_id}", b"", overwrite=True)


def nodes_of_ranks(group: str) -> dict[int, str]:
    """Where the replicas ran that announced their ranks: those that ended since are still named."""
    names = [key.decode().removeprefix(f"{_RANKS}{group}/") for key in _internal_kv_list(f"{_RANKS}{group}/")]
    return {int(rank): node_id for rank, node_id in (name.split("/") for name in names)}


@contextmanager
def patient_node() -> Iterator[None]:
    """Inside, `ray.init` waits for the node that it starts until that is there, or the node's process has ended.

    Left to itself it waits 30 s, which a busy machine exceeds. Nor does it put a handler of SIGTERM in the place of
    this process's own, which knows what to clean up and with what status to exit.
    """
    ask, set_handler = services.get_node, utils.set_sigterm_handler

    def wait_for_node(gcs_address: str, node_id: str) -> Any:
        while True:
            try:
                return ask(gcs_address, node_id)
            except RuntimeError:  # not there yet
                if not _raylet_lives(node_id):
                    raise
                time.sleep(_NODE_TICK_S)

    services.get_node, utils.set_sigterm_handler = wait_for_node, lambda handler: None
    try:
        yield
    finally:
        services.get_node, utils.set_sigterm_handler = ask, set_handler


@contextmanager
def small_node(*, metrics: bool) -> Iterator[None]:
    """Inside, `ray.init` starts a node without the processes that nobody asks of one machine's own Ray.

    No log monitor, which brings workers' output to a driver that wants none, and no monitor, which asks a cloud for
    nodes; without `metrics`, the two of the dashboard import only what a minimal installation has.
    """
    stand_in: dict[tuple[Any, str], Callable[..., Any]] = {
        (node.Node, "start_log_monitor"): lambda _: None,
        (node.Node, "start_monitor"): lambda _: None,
    }
    if not metrics:
        stand_in[utils, "get_dashboard_dependency_error"] = lambda: ImportError("not wanted")
    before = {(owner, name): getattr(owner, name) for owner, name in stand_in}
    for (owner, name), function in stand_in.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


def _raylet_lives(node_id: str) -> bool:
    """Whether this process has started the process of that node, and it has not ended."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # which one that nobody has collected counts as, too
            if f"--node_id={node_id}" in child.cmdline():
                return True
    return False


def wait_for_proxies() -> None:
    """From now on `serve.start` and `serve.run` in this process wait for Serve's proxies while those live.

    Left to themselves they give up after 60 s, which a busy machine exceeds.
    """
    api.HTTP_PROXY_TIMEOUT = client.HTTP_PROXY_TIMEOUT = _PROXIES_S


class RunsLeanEngine:
    """For a subclass of Ray's `LLMServer`, as its first base: what it needs of the server's private side."""

    engine: Any

    async def _start_engine(self) -> None:
        await self.engine.start()  # Ray's own would also start a telemetry actor, 400 MB

    @property
    def _client(self) -> Any:
        """vLLM's AsyncLLM: what `cluster.vllm_internals` takes."""
        return self.engine._engine_client


def lean_engine(on_cores: Callable[[], AbstractContextManager[None]]) -> type:
    """Ray's vLLM engine class without the processes that a small one does not need; each would import vllm (10 s).

    An engine of a single process is started inside `on_cores()`. Importing Ray's class imports vLLM, hence a function.
    """
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    class LeanEngine(VLLMEngine):
        async def start(self) -> None:
            # Ray looks for the model's files in a task of its own; for a folder there is nothing to look for.
            if Path(self.llm_config.get_engine_config().actual_hf_model_id).is_dir():  # noqa: ASYNC240 (once, at start)
                self.llm_config.get_or_create_callback().ctx.run_init_node = False
            await super().start()

        async def shutdown(self) -> None:
            await super().shutdown()
            if self._engine_client is not None:
                self._engine_client.shutdown()

        def _start_async_llm_engine(self, engine_args: Any, engine_config: Any, placement_group: Any) -> Any:
            start = partial(super()._start_async_llm_engine, engine_args, engine_config, placement_group)
            parallel = engine_config.parallel_config
            if parallel.world_size > 1:
                return start()
            if self.llm_config.accelerator_config is not None:  # on the CPU
                # The scheduler's process runs the model too. Its OpenMP threads are already set by the environment.
                parallel.distributed_executor_backend = "uni"
            with on_cores():
                return start()

    return LeanEngine
