"""The routing policy alone, and the simulation that it is measured with."""

import math
import random
import time
from collections import Counter

import pytest

from benchmarks import routing as simulated
from cluster.routing import MemoryRouting
from tests.support.memory_homes import MEMORIES, homes, policy


def test_homes_are_the_same_in_every_process_and_release():
    assert homes(range(8), MEMORIES[:12]) == [2, 5, 5, 1, 5, 4, 7, 5, 4, 1, 2, 7]


def test_homes_are_even():
    shares = Counter(homes(range(16), [str(i) for i in range(16_000)]))
    assert all(1000 - 4 * 31 < shares[rank] < 1000 + 4 * 31 for rank in range(16)), "four standard deviations"


@pytest.mark.parametrize("gone", [0, 3, 7])
def test_only_what_a_replica_held_moves(gone):
    before, after = homes(range(8)), homes(rank for rank in range(8) if rank != gone)
    assert all((old == gone) == (old != new) for old, new in zip(before, after, strict=True))
    assert len({new for old, new in zip(before, after, strict=True) if old == gone}) > 4, "to many, not to one"


def test_order_does_not_depend_on_how_replicas_are_listed():
    ranks = list(range(8))
    random.Random(0).shuffle(ranks)
    assert homes(ranks) == homes(range(8))


def test_equal_ranks_are_neighbours():
    routing = policy([0, 1, 2, 1])
    for memory in MEMORIES:
        order = routing.order(memory)
        assert order.index(3) == order.index(1) + 1


@pytest.mark.parametrize("replicas", [1, 2, 5, 32])
def test_no_load_above_the_bound_and_always_room(replicas):
    draw = random.Random(replicas)
    routing = policy(range(replicas), unhurried=1)
    loads, ongoing = [0] * replicas, []
    for _ in range(5000):
        if ongoing and draw.random() < 0.45:
            loads[ongoing.pop(draw.randrange(len(ongoing)))] -= 1
            continue
        bound = math.ceil(1.25 * (len(ongoing) + 1) / replicas)
        chosen = next(routing.candidates(MEMORIES[int(draw.paretovariate(1)) % 50], loads))
        loads[chosen] += 1
        ongoing.append(chosen)
        assert loads[chosen] <= bound == routing.bound([*loads[:chosen], loads[chosen] - 1, *loads[chosen + 1 :]])


def test_a_hot_memory_takes_the_first_of_its_order_and_draws_back():
    routing = policy(range(16))
    loads, order = [4] * 16, routing.order("hot")
    placed = [next(routing.candidates("hot", loads))]
    for _ in range(40):
        loads[placed[-1]] += 1
        placed.append(next(routing.candidates("hot", loads)))
    used = list(dict.fromkeys(placed))
    assert used[0] == order[0] and set(used) == set(order[: len(used)]), "a prefix of its order"
    assert 6 < len(used) < 16
    assert next(routing.candidates("hot", [4] * 16)) == order[0]


def test_unhurried_replicas_keep_their_memories():
    memory = next(each for each in MEMORIES if policy(range(8)).order(each)[0] == 0)
    assert next(policy(range(8)).candidates(memory, [3] + [0] * 7)) == 0
    assert next(policy(range(8)).candidates(memory, [4] + [0] * 7)) != 0
    assert next(policy(range(8), unhurried=1).candidates(memory, [1] + [0] * 7)) != 0


def test_full_replicas_are_no_candidates():
    routing = policy(range(4))
    assert list(routing.candidates("m", [5, 5, 5, 5], limit=5)) == []
    assert list(routing.candidates("m", [5, 4, 5, 5], limit=5)) == [1]


@pytest.mark.parametrize("wrong", [{"load_factor": 1.0}, {"unhurried": 0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="must be above 1"):
        MemoryRouting(**wrong)


def test_choosing_among_256_replicas_is_fast():
    routing, loads = policy(range(256)), [8] * 256
    spent = []
    for memory in MEMORIES:
        began = time.perf_counter()
        next(routing.candidates(memory, loads))
        spent.append(time.perf_counter() - began)
    assert min(spent) < 200e-6, "tens of microseconds, when nothing else is in the way"


def test_the_simulation_finds_what_its_docstring_says():
    run = simulated.Run(zipf=1.0, visit=1, mean=16, replicas=16)
    asked = simulated.traffic(run)
    asked = simulated.Traffic(asked.clients[-50_000:], asked.memories[-50_000:])
    seen = {name: simulated.simulate(asked, run, choose) for name, choose in simulated._routers(run).items()}
    ours, ring, two = (seen[name] for name in (simulated.OURS, simulated.RING, simulated.POWER_OF_TWO))
    assert ours.load <= 1.25 and ring.load > 2
    assert two.hits + 0.2 < ours.hits < ring.hits < simulated.belady(asked.memories, run.held)


def test_with_room_for_a_fifth_on_each_of_16_replicas_hardly_a_question_misses():
    run = simulated.Run(zipf=1.0, visit=1, mean=16, replicas=16, held=16 * 2_000)
    seen = simulated.simulate(simulated.traffic(run), run, simulated._ours(16))
    assert seen.hits > 0.95 and seen.load <= 1.25


def test_belady_is_the_best_there_is(monkeypatch):
    monkeypatch.setattr(simulated, "QUESTIONS", 6)
    assert simulated.belady([1, 2, 3, 1, 2, 4, 1], 2) == 3 / 6
    assert simulated.one_lru([1, 2, 3, 1, 2, 4, 1], 2) == 0
