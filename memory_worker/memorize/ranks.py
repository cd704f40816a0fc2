"""The ranks of one Memorizer: the windows of every group are spread over it and actors beside it.

Rank 0 is the Memorizer itself. It tells the others what to begin and when to take the next group; then all of them run
that group together, with one all-gather a layer (`beacon/exchange.py`). A rank that dies, fails or is silent for too
long fails the group: rank 0 raises `LostRank`, all other ranks are ended, and the next text that is begun starts them
anew. What was done since a job's last checkpoint is done again.
"""

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.pools.pools import PoolConfig
from memory_worker.config import MemoryConfig
from memory_worker.errors import LostRank

if TYPE_CHECKING:
    from torch import Tensor

    from memory_worker.models.beacon import BeaconModel, Exchange, Part, Slots
    from memory_worker.models.stock import MemoryModel

_ANSWER_S = 5.0  # after a failure, how long the others' answers are waited for, which say what it was
logger = logging.getLogger("ray.serve")


def load_model(config: MemoryConfig) -> "MemoryModel":
    """The memory model as `config` has it, on this process's device; sets torch's threads.

    Raises `UnsupportedCheckpoint`, also where the model is to be spread over ranks but cannot be.
    """
    import torch

    from memory_worker.models.beacon import BeaconModel, UnsupportedCheckpoint
    from memory_worker.models.stock import load_memory_model

    if config.memorize.threads:
        torch.set_num_threads(config.memorize.threads)
    device = config.memorize.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_memory_model(config.engine.model, dtype=getattr(torch, config.memorize.dtype), device=device)
    if config.memorize.ranks > 1 and not isinstance(model, BeaconModel):
        raise UnsupportedCheckpoint(
            f"{config.engine.model} is read by transformers, which does not share a text over ranks: set "
            "memory.memorize.ranks to 1, and memorize with more replicas instead"
        )
    return model


def rank_share(config: MemoryConfig, pool: PoolConfig) -> dict[str, float]:
    """What one rank takes, by Ray resource: as much as the pool gives a rank of the engine, so that both fit it.

    Raises `ValueError` where ranks would have to share a GPU.
    """
    beside = config.engine.ranks
    gpus = pool.gpus_per_replica / beside
    if not gpus.is_integer():
        raise ValueError(
            f"memorize.ranks is {config.memorize.ranks} and each needs a GPU of its own, but the memory pool's "
            f"gpus_per_replica is {pool.gpus_per_replica:g}: set it to {beside}, or memorize.ranks to 1"
        )
    share = {"CPU": pool.cpus_per_replica, "GPU": gpus}
    if pool.accelerator_type:
        share[f"accelerator_type:{pool.accelerator_type}"] = 0.001
    share |= {name: amount / beside for name, amount in pool.resources.items()}
    return {name: amount for name, amount in share.items() if amount}


def replica_options(config: MemoryConfig, pool: PoolConfig) -> dict[str, Any]:
    """Options of a Serve deployment whose replicas each reserve a bundle for every rank."""
    share = rank_share(config, pool)
    options: dict[str, Any] = {
        "ray_actor_options": _actor_options(share),
        "placement_group_bundles": [share] * config.memorize.ranks,
        "placement_group_strategy": "PACK",
    }
    if pool.node_labels:
        options["placement_group_bundle_label_selector"] = [dict(pool.node_labels)]
    return options


class Rank:
    """One rank but the first, an actor. Its methods are called by rank 0 alone, one after another."""

    def __init__(self, config: MemoryConfig) -> None:
        self._timeout_s = config.memorize.rank_timeout_s
        self._model = cast("BeaconModel", load_model(config))
        self._exchange: Exchange | None = None
        self._jobs: dict[int, Iterator[tuple[Part, ...]]] = {}

    def fingerprint(self) -> str:
        """Of the model that is loaded."""
        return self._model.fingerprint

    def join(self, host: str, port: int, rank: int, ranks: int) -> None:
        """Takes part in the exchange whose store is at `host`:`port`. Raises `ExchangeFailed`."""
        from memory_worker.models.beacon.exchange import reach_store

        store = reach_store(host, port, ranks, self._timeout_s)
        self._exchange = _exchange(store, rank, ranks, self._model, self._timeout_s)

    def begin(
        self, job: int, texts: "tuple[Sequence[Tensor], Sequence[Slots]]", ratio: int | None, group_windows: int
    ) -> None:
        """The next `step` of `job` runs its first group; `texts` are its documents and the memory before each."""
        documents, memory = texts
        self._jobs[job] = self._model.compress_documents(
            documents, ratio=ratio, memory=memory, group_windows=group_windows, exchange=self._exchange
        )

    def step(self, job: int) -> None:
        """Runs the job's next group with all other ranks. What fails ends the exchange, so that nobody waits for it."""
        try:
            next(self._jobs[job], None)
        except BaseException:
            if self._exchange:
                self._exchange.close()
            raise

    def end(self, job: int) -> None:
        """Lets go of a job that is done or given up."""
        self._jobs.pop(job, None)


class Ranks:
    """All ranks of a Memorizer, seen from the first. But for its making, to be used in one thread."""

    def __init__(self, config: MemoryConfig, share: Mapping[str, float]) -> None:
        """Starts the other ranks, each with `share` of Ray's resources; they load the model meanwhile."""
        self._config = config
        self.count = config.memorize.ranks
        self._share = share
        self._bundles = get_current_placement_group()  # known to the thread that makes the replica alone
        self._jobs = itertools.count()
        self._team = self._new_team()
        self._model: BeaconModel | None = None

    def join(self, model: "MemoryModel") -> None:
        """Waits until all ranks are there; `model` is the first rank's. Raises `LostRank` if one cannot be had."""
        self._model = cast("BeaconModel", model)  # `load_model` has refused others
        self._team.join(self._model)

    def compress_documents(
        self, documents: "Sequence[Tensor]", *, ratio: int | None, memory: "Sequence[Slots]", group_windows: int
    ) -> "Iterator[tuple[Part, ...]]":
        """As `BeaconModel.compress_documents`, with groups of `group_windows` on all ranks together.

        Raises `LostRank` as well.
        """
        assert self._model is not None, "join comes first"
        if self._team.over:
            logger.warning("the Memorizer's ranks are started anew")
            self._team = self._new_team()
            self._team.join(self._model)
        team, job = self._team, next(self._jobs)
        team.tell("begin", job, ray.put((documents, memory)), ratio, group_windows)
        own = self._model.compress_documents(
            documents, ratio=ratio, memory=memory, group_windows=group_windows, exchange=team.exchange
        )
        try:
            while (parts := team.step(job, own)) is not None:
                yield parts
        finally:
            team.tell("end", job)

    def _new_team(self) -> "_Team":
        return _Team(self._config, self._share, self._bundles)


class _Team:
    """Ranks that have one exchange: they begin together, and end together."""

    def __init__(self, config: MemoryConfig, share: Mapping[str, float], bundles: Any) -> None:
        self._ranks = config.memorize.ranks
        self._start_s = config.memorize.rank_start_s
        self._timeout_s = config.memorize.rank_timeout_s
        self.exchange: Exchange | None = None
        self.over: LostRank | None = None
        self._actors: list[Any] = []
        for rank in range(1, self._ranks):
            options = _actor_options(share)
            if bundles:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(bundles, rank)
            self._actors.append(ray.remote(Rank).options(max_restarts=0, **options).remote(config))

    def join(self, model: "BeaconModel") -> None:
        """Raises `LostRank`."""
        from memory_worker.models.beacon.exchange import serve_store

        replies = [actor.fingerprint.remote() for actor in self._actors]
        try:
            for rank, fingerprint in enumerate(ray.get(replies, timeout=self._start_s), start=1):
                if fingerprint != model.fingerprint:
                    raise LostRank(rank, self._ranks, "it loaded another model: the checkpoint differs on its node")
            host = ray.util.get_node_ip_address()
            store, port = serve_store(host, self._ranks, self._timeout_s)
            replies = [
                actor.join.remote(host, port, rank, self._ranks) for rank, actor in enumerate(self._actors, start=1)
            ]
            self.exchange = _exchange(store, 0, self._ranks, model, self._timeout_s)
            ray.get(replies, timeout=self._timeout_s)
        except Exception as error:
            raise self._end(error, replies) from error

    def tell(self, method: str, *arguments: Any) -> None:
        """Without waiting; ranks that are no more are not told."""
        if not self.over:
            for actor in self._actors:
                getattr(actor, method).remote(*arguments)

    def step(self, job: int, own: "Iterator[tuple[Part, ...]]") -> "tuple[Part, ...] | None":
        """The next group on all ranks; what it added, or none after the last. Raises `LostRank`."""
        if self.over:
            raise copy.copy(self.over)
        replies = [actor.step.remote(job) for actor in self._actors]
        try:
            parts = next(own, None)
            ray.get(replies, timeout=self._timeout_s)
        except Exception as error:
            raise self._end(error, replies) from error
        return parts

    def _end(self, error: Exception, replies: list[Any]) -> Exception:
        """Ends all ranks; returns what is to be raised: `LostRank`, or `error` if rank 0 itself is to blame."""
        from memory_worker.models.beacon import ExchangeFailed

        if self.exchange:
            self.exchange.close()
        others_failed = isinstance(error, LostRank | ExchangeFailed | RayError)
        lost = error if isinstance(error, LostRank) else self._find_lost(error, replies)
        for actor in self._actors:
            ray.kill(actor)
        self.over = lost
        return lost if others_failed else error

    def _find_lost(self, error: Exception, replies: list[Any]) -> LostRank:
        """Which rank was lost, and why: the first that says more than that others failed it, else the first silent."""
        from memory_worker.models.beacon import ExchangeFailed

        answered, _ = ray.wait(replies, num_returns=len(replies), timeout=_ANSWER_S)
        silent = None
        for rank, reply in enumerate(replies, start=1):
            if reply not in answered:
                silent = silent or rank
                continue
            try:
                ray.get(reply)
            except RayError as failure:
                cause = getattr(failure, "cause", None) or failure
                if not isinstance(cause, ExchangeFailed):
                    return LostRank(rank, self._ranks, f"{type(cause).__name__}: {cause}".splitlines()[0])
        if silent:
            reason = "it did not answer in time" if isinstance(error, GetTimeoutError) else f"it is silent: {error}"
            return LostRank(silent, self._ranks, reason)
        return LostRank(0, self._ranks, f"{type(error).__name__}: {error}")


def _exchange(store: Any, rank: int, ranks: int, model: "BeaconModel", timeout_s: float) -> "Exchange":
    from memory_worker.models.beacon import Exchange

    host = ray.util.get_node_ip_address()
    return Exchange(store, rank, ranks, host=host, device=model.device, timeout_s=timeout_s)


def _actor_options(share: Mapping[str, float]) -> dict[str, Any]:
    """Ray's options of an actor that takes `share`."""
    custom = {name: amount for name, amount in share.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": share.get("CPU", 0), "num_gpus": share.get("GPU", 0), "resources": custom}
