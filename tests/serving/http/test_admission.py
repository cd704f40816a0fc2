"""The rate is kept by all replicas together, for each tenant alone; nobody waits for a call that is not needed."""

import asyncio
import itertools
import random

import pytest

from memory_worker.catalog.quotas import Quota, QuotasConfig
from memory_worker.catalog.rates import RateLimiter
from serving.errors import ProblemError
from serving.http.admission import PERMITS_VALID_S, Admission, InFlight


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Central:
    """The central actor, and how often it was asked."""

    def __init__(self, clock: Clock, quotas: QuotasConfig) -> None:
        self.limiter = RateLimiter(clock)
        self.quotas = quotas
        self.asked: list[tuple[str, int]] = []

    async def grant(self, tenant: str, wanted: int) -> tuple[int, float]:
        self.asked.append((tenant, wanted))
        per_minute = self.quotas.of(tenant).requests_per_minute
        assert per_minute is not None
        return self.limiter.grant(tenant, per_minute, wanted)


def cluster(per_minute: int | None, replicas: int = 1) -> tuple[Clock, Central, list[Admission]]:
    clock = Clock()
    quotas = QuotasConfig(default=Quota(requests_per_minute=per_minute))
    central = Central(clock, quotas)
    return clock, central, [Admission(quotas, central.grant, clock) for _ in range(replicas)]


async def admitted(admission: Admission, tenant: str = "a") -> bool:
    try:
        await admission.admit(tenant)
        return True
    except ProblemError as problem:
        assert problem.status == 429 and problem.members["retry_after"] >= 1
        return False


# -- the central bucket ------------------------------------------------------------------------------------


def test_a_bucket_holds_a_minute_and_refills_evenly() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert limiter.grant("a", 60, 50) == (50, 0.0)
    assert limiter.grant("a", 60, 50) == (10, 0.0)
    assert limiter.grant("a", 60, 1) == (0, pytest.approx(1.0))
    clock.now += 0.25
    assert limiter.grant("a", 60, 1) == (0, pytest.approx(0.75))
    clock.now += 0.75
    assert limiter.grant("a", 60, 5) == (1, 0.0)
    clock.now += 1e6
    assert limiter.grant("a", 60, 1000) == (60, 0.0)


def test_retry_after_is_exactly_when_it_is_worth_trying() -> None:
    for per_minute in (1, 7, 60, 999):
        clock = Clock()
        limiter = RateLimiter(clock)
        limiter.grant("a", per_minute, per_minute)
        for _ in range(100):
            granted, retry_after_s = limiter.grant("a", per_minute, 1)
            assert not granted
            clock.now += retry_after_s
            assert limiter.grant("a", per_minute, 1) == (1, 0.0)


def test_one_tenants_flood_takes_nothing_from_another() -> None:
    limiter = RateLimiter(Clock())
    assert limiter.grant("flood", 60, 10_000)[0] == 60
    assert not any(limiter.grant("flood", 60, 1)[0] for _ in range(1000))
    assert limiter.grant("calm", 60, 60) == (60, 0.0)


def test_time_that_goes_backwards_neither_fills_nor_starves() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.grant("a", 60, 60)
    clock.now -= 500
    assert limiter.grant("a", 60, 1)[0] == 0
    clock.now += 2
    assert limiter.grant("a", 60, 5)[0] == 2


def test_a_lower_quota_applies_at_once() -> None:
    limiter = RateLimiter(Clock())
    limiter.grant("a", 1000, 1)
    assert limiter.grant("a", 10, 1000)[0] == 10


# -- replicas ----------------------------------------------------------------------------------------------


async def test_no_limit_asks_nobody() -> None:
    _, central, [admission] = cluster(None)
    for _ in range(100):
        await admission.admit("a")
    assert not central.asked


@pytest.mark.parametrize("replicas", [1, 3, 16])
@pytest.mark.parametrize("per_minute", [5, 60, 600])
async def test_replicas_together_keep_to_the_rate(replicas: int, per_minute: int) -> None:
    clock, _, fleet = cluster(per_minute, replicas)
    chance = random.Random(replicas * per_minute)
    times: list[float] = []
    for _ in range(6000):  # three times the rate, at random replicas, for a long while
        clock.now += chance.expovariate(3 * per_minute / 60)
        if await admitted(chance.choice(fleet)):
            times.append(clock.now)
    for width in (1.0, 10.0, 60.0, 300.0):
        most, start = per_minute * (1 + (width + PERMITS_VALID_S) / 60), 0
        for end, time in enumerate(times):
            while time - times[start] > width:
                start += 1
            assert end - start + 1 <= most + 1
    # Nor much less: a flood on few replicas uses what it is granted.
    enough = per_minute * (clock.now - 1000) / 60
    assert len(times) >= (0.9 if replicas == 1 else 0.6) * enough


@pytest.mark.parametrize("replicas", [1, 4, 16])
async def test_a_tenant_below_its_rate_is_not_refused(replicas: int) -> None:
    clock, _, fleet = cluster(60, replicas)
    for number in range(600):
        clock.now += 1.05
        assert await admitted(fleet[number % replicas]), number


async def test_most_requests_ask_nobody() -> None:
    clock, central, [admission] = cluster(6000)
    for _ in range(5000):
        clock.now += 0.0101
        assert await admitted(admission)
    assert len(central.asked) < 50
    assert max(wanted for _, wanted in central.asked) <= 6000 // 20


async def test_refused_requests_ask_only_when_it_may_help() -> None:
    clock, central, [admission] = cluster(60)
    outcomes = await asyncio.gather(*(admitted(admission) for _ in range(500)))
    assert sum(outcomes) == 60
    asked = len(central.asked)
    for _ in range(1000):
        clock.now += 0.01
        await admitted(admission)
    assert len(central.asked) - asked <= 2 * 10


async def test_tenants_are_counted_apart_on_a_replica() -> None:
    _, _, [admission] = cluster(60)
    flood = await asyncio.gather(*(admitted(admission, "flood") for _ in range(500)))
    assert sum(flood) == 60
    assert all([await admitted(admission, "calm") for _ in range(60)])


async def test_permits_do_not_outlive_time_that_goes_backwards() -> None:
    clock, central, [admission] = cluster(600)
    for _ in range(20):
        assert await admitted(admission)
    asked = len(central.asked)
    clock.now -= 100
    assert await admitted(admission)
    assert len(central.asked) == asked + 1


async def test_a_central_actor_that_fails_lets_nobody_in() -> None:
    async def fails(tenant: str, wanted: int) -> tuple[int, float]:
        raise ConnectionError

    admission = Admission(QuotasConfig(default=Quota(requests_per_minute=1)), fails)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await admission.admit("a")


async def test_a_slow_call_for_one_tenant_does_not_hold_another() -> None:
    gate = asyncio.Event()

    async def grant(tenant: str, wanted: int) -> tuple[int, float]:
        if tenant == "slow":
            await gate.wait()
        return wanted, 0.0

    admission = Admission(QuotasConfig(default=Quota(requests_per_minute=60)), grant)
    slow = asyncio.create_task(admission.admit("slow"))
    await admission.admit("quick")
    assert not slow.done()
    gate.set()
    await slow


# -- in flight ---------------------------------------------------------------------------------------------


async def test_questions_in_flight_are_bounded() -> None:
    in_flight = InFlight(2)
    async with in_flight:
        with pytest.raises(ZeroDivisionError):
            async with in_flight:
                assert in_flight.count == 2
                with pytest.raises(ProblemError, match="2 questions are being answered here") as refused:
                    async with in_flight:
                        raise AssertionError("let in")
                assert refused.value.status == 429 and refused.value.members == {"retry_after": 1}
                raise ZeroDivisionError
        async with in_flight:
            assert in_flight.count == 2
    assert in_flight.count == 0


async def test_a_cancelled_question_gives_its_place_back() -> None:
    in_flight = InFlight(1)

    async def ask() -> None:
        async with in_flight:
            await asyncio.Event().wait()

    for _ in itertools.repeat(None, 3):
        task = asyncio.create_task(ask())
        await asyncio.wait({task}, timeout=0)
        assert in_flight.count == 1
        task.cancel()
        await asyncio.wait({task})
    assert in_flight.count == 0
