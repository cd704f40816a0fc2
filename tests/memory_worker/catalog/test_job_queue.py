"""Who works on what next: fairness between tenants, leases, limits."""

import random

import pytest

from memory_worker.catalog.job_queue import JobQueue
from memory_worker.errors import QueueFull
from memory_worker.manifest import MemoryKey


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(tenant: str, number: int) -> MemoryKey:
    return MemoryKey(tenant, f"book-{number}", "v000001-00000000")


def queue(running: int = 2, waiting: int = 100) -> tuple[JobQueue, Clock]:
    clock = Clock()
    return JobQueue(running, waiting, 30.0, clock), clock


def test_a_tenant_with_a_thousand_jobs_does_not_keep_another_from_one() -> None:
    jobs, _ = queue(running=2, waiting=2000)
    for number in range(1000):
        jobs.add(key("many", number))
    assert [jobs.take("r"), jobs.take("r")] == [key("many", 0), key("many", 1)]
    jobs.add(key("one", 0))
    jobs.remove(key("many", 0))
    assert jobs.take("r") == key("one", 0)
    jobs.remove(key("one", 0))
    assert jobs.take("r") == key("many", 2)


def test_tenants_take_turns_and_each_has_its_own_order() -> None:
    jobs, _ = queue(running=1)
    for tenant in "abc":
        for number in range(3):
            jobs.add(key(tenant, number))
    order = []
    while (taken := jobs.take("r")) is not None:
        order.append(taken)
        jobs.remove(taken)
    assert order == [key(tenant, number) for number in range(3) for tenant in "abc"]


def test_no_more_run_or_wait_than_may() -> None:
    jobs, _ = queue(running=3, waiting=5)
    for number in range(5):
        jobs.add(key("a", number))
    with pytest.raises(QueueFull, match="5 jobs are waiting"):
        jobs.add(key("b", 0))
    assert [jobs.take("r") for _ in range(4)] == [key("a", 0), key("a", 1), key("a", 2), None]
    jobs.add(key("b", 0))
    jobs.configure(4, 5, 30.0)
    assert jobs.take("r") == key("b", 0)
    assert jobs.of_tenant("a") == {key("a", number) for number in range(5)}


def test_a_job_that_is_not_durable_has_its_place_and_is_not_taken() -> None:
    jobs, _ = queue(waiting=1)
    jobs.add(key("a", 0), durable=False)
    with pytest.raises(QueueFull):
        jobs.add(key("b", 0))
    assert jobs.take("r") is None
    jobs.mark_durable(key("a", 0))
    assert jobs.take("r") == key("a", 0)


def test_leases() -> None:
    jobs, clock = queue()
    jobs.add(key("a", 0))
    assert jobs.take("first") == key("a", 0)
    assert not jobs.renew(key("a", 0), "second") and jobs.renew(key("a", 0), "first")
    clock.now += 29
    assert jobs.take("second") is None and jobs.renew(key("a", 0), "first")
    clock.now += 29
    assert jobs.take("second") is None
    clock.now += 2
    assert jobs.take("second") == key("a", 0)
    assert not jobs.renew(key("a", 0), "first")
    jobs.restore(key("a", 1))
    assert jobs.take("third") is None, "whoever worked on it may still do so"
    assert jobs.renew(key("a", 1), "fourth") and not jobs.renew(key("a", 1), "third")


def test_whatever_happens_a_job_has_one_worker_at_a_time_and_none_is_lost() -> None:
    chance = random.Random(7)
    jobs, clock = queue(running=5, waiting=10_000)
    added, done = set(), set()
    holders: dict[MemoryKey, tuple[str, float]] = {}
    for step in range(5000):
        clock.now += chance.random() * 3
        act = chance.random()
        if act < 0.2 and step < 3000:
            new = key(chance.choice("abcdef"), step)
            jobs.add(new)
            added.add(new)
        elif act < 0.6:
            runner = f"r{chance.randrange(9)}"
            if taken := jobs.take(runner):
                held = holders.get(taken)
                assert held is None or held[1] <= clock.now
                holders[taken] = runner, clock.now + 30
        elif holders:
            job = chance.choice(sorted(holders, key=str))
            runner = holders[job][0]
            if chance.random() < 0.5:
                if jobs.renew(job, runner):
                    holders[job] = runner, clock.now + 30
            else:
                jobs.remove(job)
                done.add(job)
                del holders[job]
        assert sum(expires > clock.now for _, expires in holders.values()) <= 5
    for left in added - done:
        clock.now += 31
        assert left in jobs.of_tenant(left.tenant)
