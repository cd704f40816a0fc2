"""Serve's real replicas behind the router by memory."""

import asyncio
import math
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from cluster.ray_internals import MemoryRouter
from cluster.routing import ReportsRank
from tests.support.memory_homes import MEMORIES, homes
from tests.support.waiting import until


@ray.remote(num_cpus=0)
class Gate:
    """All questions pass here: it counts them by the replica that works on them, and can hold them."""

    def __init__(self):
        self.ongoing, self.most = Counter(), Counter()
        self.open = asyncio.Event()
        self.open.set()

    async def passed(self, rank: int) -> None:
        self.ongoing[rank] += 1
        self.most[rank] = max(self.most[rank], self.ongoing[rank])
        await self.open.wait()
        self.ongoing[rank] -= 1

    async def close(self) -> None:
        self.most = self.ongoing.copy()
        self.open.clear()

    async def reopen(self) -> None:
        self.open.set()

    async def seen(self) -> tuple[int, list[int]]:
        """Questions that are worked on, and the most that each replica ever had since `close`."""
        return sum(self.ongoing.values()), [self.most[rank] for rank in range(4)]


class Replica(ReportsRank):
    """Says who it is."""

    async def who(self) -> tuple[int, int]:
        """Rank and process."""
        rank = serve.get_replica_context().rank.rank
        await ray.get_actor("gate", "routing").passed.remote(rank)
        return rank, os.getpid()


class Caller:
    """Asks from inside a replica, where all calls of one request share Serve's internal id."""

    def __init__(self, replicas):
        self.replicas = replicas

    async def ask(self, memories: list[str]) -> list[tuple[int, int]]:
        return await asyncio.gather(*(self.replicas.options(session_id=each).who.remote() for each in memories))


class Wanted:
    """An autoscaling policy: as many replicas as the file says."""

    def __init__(self, file: str):
        self.file = Path(file)

    def __call__(self, context) -> tuple[int, dict]:
        return int(self.file.read_text()), {}


def application(wanted: Path) -> serve.Application:
    answering = serve.deployment(
        autoscaling_config=AutoscalingConfig(
            min_replicas=3,
            max_replicas=4,
            initial_replicas=4,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=Wanted, policy_kwargs={"file": str(wanted)}),
        ),
        max_ongoing_requests=20,
        health_check_period_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(
            request_router_class=MemoryRouter, request_routing_stats_period_s=1.0
        ),
    )(Replica)
    return serve.deployment(ray_actor_options={"num_cpus": 0.1})(Caller).bind(answering.bind())


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    file = tmp_path_factory.mktemp("routing") / "replicas"
    file.write_text("4")
    return file


@pytest.fixture(scope="module")
def caller(wanted, local_ray):
    _gate = Gate.options(name="gate", namespace="routing").remote()  # type: ignore[attr-defined]  # lives while this does
    yield serve.run(application(wanted), name="routing", route_prefix=None)


@pytest.fixture(scope="module")
def replicas(caller):
    return serve.get_deployment_handle("Replica", "routing")


@pytest.fixture(scope="module")
def gate(caller):
    return ray.get_actor("gate", "routing")


async def asked(replicas, memories) -> list[tuple[int, int]]:
    """Where questions on the memories, asked one after another, are answered."""
    return [await replicas.options(session_id=memory).who.remote() for memory in memories]


async def held(replicas, gate, memories, ongoing: int) -> tuple[list[int], list[asyncio.Task]]:
    """Questions on the memories, all at once: the most that each replica had when `ongoing` are held; who asks."""
    await gate.close.remote()

    async def one(memory):
        return await replicas.options(session_id=memory).who.remote()

    asking = [asyncio.create_task(one(memory)) for memory in memories]

    async def all_there():
        return (await gate.seen.remote())[0] == ongoing

    await until(all_there)
    return (await gate.seen.remote())[1], asking


async def settled(replicas, ranks=range(4)) -> list[tuple[int, int]]:
    """Where questions on the first memories are answered, once each is answered at its home."""
    memories, seen = MEMORIES[:60], []

    async def at_home():
        seen[:] = await asked(replicas, memories)
        return [rank for rank, _ in seen] == homes(ranks, memories)

    await until(at_home)
    return seen


async def test_memories_are_pinned_by_rank(replicas):
    seen = await settled(replicas)
    for _ in range(3):
        assert await asked(replicas, MEMORIES[:60]) == seen


async def test_handles_agree_and_calls_of_one_request_do_not_change_places(caller, replicas):
    memories = [next(m for m in MEMORIES if homes(range(4), [m]) == [rank]) for rank in (2, 0, 3, 1)]
    assert await caller.ask.remote(memories) == await asked(replicas, memories)
    answered = await caller.ask.remote(MEMORIES[:50])
    assert {rank for rank, _ in answered} == {0, 1, 2, 3}


async def test_requests_without_a_memory_are_spread(replicas):
    answered = [await replicas.who.remote() for _ in range(60)]
    assert Counter(rank for rank, _ in answered).keys() == {0, 1, 2, 3}


async def test_a_hot_memory_is_spread_within_the_bound(replicas, gate):
    [(home, _)] = await asked(replicas, ["hot"])
    most, asking = await held(replicas, gate, ["hot"] * 40, ongoing=40)
    assert max(most) <= math.ceil(1.25 * 40 / 4) and min(most) >= 1, most
    await gate.reopen.remote()
    assert len(await asyncio.gather(*asking)) == 40

    async def drawn_back():  # once the router has heard of the answers
        return (await asked(replicas, ["hot"]))[0][0] == home

    await until(drawn_back)


async def test_full_replicas_get_no_more(replicas, gate):
    most, asking = await held(replicas, gate, [*MEMORIES[:60], *["hot"] * 40], ongoing=80)
    assert most == [20] * 4
    await gate.reopen.remote()
    assert len(await asyncio.gather(*asking)) == 100


async def test_a_replica_that_dies_and_returns_has_its_memories_back(replicas):
    before = await settled(replicas)
    rank, process = before[0]
    os.kill(process, signal.SIGKILL)
    meanwhile = await asked(replicas, MEMORIES[:60])
    for old, new in zip(before, meanwhile, strict=True):
        assert new == old if old[0] != rank else new[1] != process
    after = await settled(replicas)
    assert [each for each in after if each[0] != rank] == [each for each in before if each[0] != rank]
    assert after[0] != before[0], "another process, the same rank"


async def test_routers_follow_when_ranks_are_renumbered(replicas, wanted):
    before = await settled(replicas)
    wanted.write_text("3")
    after = await settled(replicas, range(3))
    assert len(set(before)) == 4 and len(set(after)) == 3
    assert {process for _, process in after} < {process for _, process in before}, "none was replaced"
