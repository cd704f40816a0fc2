"""Routing by memory against Serve's power-of-two-choices and consistent-hash routers: simulated, 4 to 256 replicas.

10,000 memories, asked for with Zipf frequencies; the replicas together hold 20 % of them, each its share in an LRU.
For each replica there are 16 clients (column `mean`), who ask their next question the moment the last is answered;
which is answered next is drawn evenly: an engine batches, so a question takes no longer on a busy replica. All routers
see the same questions and the true loads. With one question a visit, each question's memory is drawn anew; with five,
a client stays with a memory for five questions.

`by memory` is `cluster.routing.MemoryRouting` itself. Serve's two are as in Ray 2.60. `ring` runs the installed class
(`ray/serve/experimental/consistent_hash_router.py`): 100 virtual nodes, and two fallbacks for a replica that has
`max_ongoing_requests`, 256 as in our pools; where those are full, too, the request is `refused`: it would wait.
`power of two` is as in `ray/serve/_private/request_router/pow_2_router.py`: two different replicas at random, and the
shorter queue of them.

**95 % hits at Zipf 1.0 with memory for 20 % of the memories is more than any router can give.** For questions
drawn anew, the best that does not know the future is to hold the most frequent memories, and the top 2,000 of 10,000
carry H(2000) / H(10000) = 83.6 % of the questions. So the table has two bounds beside the hits, each of one cache as
large as all replicas' together, with no bound on load: `one LRU` is what perfect routing gives replicas that are
LRUs, and `optimum` is Belady's, which knows the future. `load` is the most ongoing requests that any replica had in the
whole run, over the mean. Then follow the shares of memories that have another home after a replica (a middle one)
died, one more joined, one died and was replaced, or one was let go for good and Serve renumbered the others' ranks.
The last rows but four have one client a replica: there the bound alone (`unhurried 1`) undoes much of the routing, see
`MemoryRouting`. In the last four each replica by itself has room for 20 % of the memories: from 5 replicas on there is
a place for every memory, and a miss is a memory that its replica never had or had to share.
"""

import heapq
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ray.serve._private.common import DeploymentID
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import ReplicaID

from benchmarks.report import make_parser, report
from cluster.routing import MemoryRouting

MEMORIES, HELD = 10_000, 2_000
REPLICAS = (4, 16, 64, 256)
ZIPF = (0.8, 1.0, 1.2)
CLIENTS = 16  # of each replica: the mean of its ongoing requests
MAX_ONGOING = 256
QUESTIONS = 40_000  # that are counted, after as many that fill the caches
STAY = 5  # questions a visit, where clients stay
SEED = 20250901
OURS, RING, POWER_OF_TWO = "by memory", "ring", "power of two"

Choose = Callable[[int, Sequence[int]], int | None]  # memory, ongoing requests of each replica → replica, if any


class Run(NamedTuple):
    zipf: float  # the i-th memory is asked for in proportion to i ** -zipf
    visit: int  # questions a visit
    mean: int  # ongoing requests of a replica
    replicas: int
    held: int = HELD  # memories that all replicas together have room for


MOVED_WITH = [Run(1.0, 1, CLIENTS, replicas) for replicas in REPLICAS]  # what moves does not depend on the traffic
RUNS = [
    *(Run(zipf, 1, CLIENTS, replicas) for zipf in ZIPF for replicas in REPLICAS),
    *(Run(1.0, STAY, CLIENTS, replicas) for replicas in REPLICAS),
    Run(1.0, 1, 1, 16),  # hardly anything to do
    *(Run(1.0, 1, CLIENTS, replicas, replicas * HELD) for replicas in REPLICAS),  # room for 20 % on each
]


class Traffic(NamedTuple):
    """Questions in the order they are asked: which client asks, and for which memory."""

    clients: list[int]
    memories: list[int]


class Outcome(NamedTuple):
    hits: float  # of the questions that were served
    load: float  # the highest of any replica, over the mean
    refused: float  # of all questions: found every replica full that the router would try


def main() -> None:
    parser = make_parser(__doc__)
    arguments = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the ring announces each of its rebuilds
    rows = [row for run in RUNS for row in _rows(run)]
    report(f"routing: {MEMORIES} memories", rows, _ratios(rows), arguments.json)


def _rows(run: Run) -> list[dict[str, Any]]:
    asked = traffic(run)
    bounds = {"one LRU": one_lru(asked.memories, run.held), "optimum": belady(asked.memories, run.held)}
    rows = []
    for name, choose in _routers(run).items():
        seen = simulate(asked, run, choose)
        row = {
            **run._asdict(),
            "router": name,
            "hits": seen.hits,
            **bounds,
            "of optimum": seen.hits / bounds["optimum"],
        }
        row |= {"load": seen.load, "refused": seen.refused}
        if run in MOVED_WITH:
            row |= _measure_moved(name, run.replicas)
        rows.append(row)
    return rows


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """At Zipf 1.0 and 16 replicas, where not said otherwise."""
    found = {(row["router"], *(row[name] for name in Run._fields)): row for row in rows}
    ours, staying = found[OURS, 1.0, 1, CLIENTS, 16, HELD], found[OURS, 1.0, STAY, CLIENTS, 16, HELD]
    return {
        "hits": ours["hits"],
        "best_without_foresight": float(_frequencies(1.0)[:HELD].sum()),
        "hits_over_one_lru": ours["hits"] / ours["one LRU"],
        "hits_over_power_of_two": ours["hits"] / found[POWER_OF_TWO, 1.0, 1, CLIENTS, 16, HELD]["hits"],
        "hits_room_for_a_fifth_on_each": found[OURS, 1.0, 1, CLIENTS, 16, 16 * HELD]["hits"],
        f"hits_{STAY}_questions_a_visit": staying["hits"],
        "highest_load_of_all_runs": max(
            row["load"] for row in rows if row["router"] == OURS and row["mean"] == CLIENTS
        ),
        "moved_by_a_restart": ours["restarts"],
    }


def traffic(run: Run) -> Traffic:
    """First a question of each client, then those that fill the caches, then `QUESTIONS`.

    The more room, the longer that takes: the rarest memory must have been asked for, too.
    """
    clients = run.mean * run.replicas
    filling = QUESTIONS if run.held == HELD else 10 * QUESTIONS
    draw = np.random.default_rng(SEED)
    asking = np.concatenate([np.arange(clients), draw.integers(clients, size=filling + QUESTIONS)])
    visited = draw.choice(MEMORIES, size=len(asking), p=_frequencies(run.zipf)).tolist()
    if run.visit == 1:
        return Traffic(asking.tolist(), visited)
    memories, left, at = [], [0] * clients, [0] * clients
    for client, memory in zip(asking.tolist(), visited, strict=True):
        if not left[client]:
            left[client], at[client] = run.visit, memory
        left[client] -= 1
        memories.append(at[client])
    return Traffic(asking.tolist(), memories)


def simulate(asked: Traffic, run: Run, choose: Choose) -> Outcome:
    room = [len(part) for part in np.array_split(np.arange(run.held), run.replicas)]
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(run.replicas)]
    loads = [0] * run.replicas
    at: dict[int, int] = {}  # client → replica that works on its question
    hits = served = highest = 0
    counted_from = len(asked.memories) - QUESTIONS
    for step, (client, memory) in enumerate(zip(*asked, strict=True)):
        if client in at:
            loads[at.pop(client)] -= 1  # its last question is answered
        replica = choose(memory, loads)
        if replica is None:
            continue
        at[client] = replica
        loads[replica] += 1
        hit = _touch(held[replica], memory, room[replica])
        highest = max(highest, loads[replica])
        if step >= counted_from:
            hits += hit
            served += 1
    return Outcome(hits / served, highest / run.mean, 1 - served / QUESTIONS)


def one_lru(memories: list[int], room: int) -> float:
    """Hits of one LRU with room for all that the replicas hold."""
    held: OrderedDict[int, None] = OrderedDict()
    return sum([_touch(held, memory, room) for memory in memories][-QUESTIONS:]) / QUESTIONS


def belady(memories: list[int], room: int) -> float:
    """Hits of one cache that always drops what is needed last, itself included: no policy has more (Belady 1966)."""
    never = len(memories)
    next_use = [never] * never
    upcoming: dict[int, int] = {}
    for step in range(never - 1, -1, -1):
        next_use[step] = upcoming.get(memories[step], never)
        upcoming[memories[step]] = step
    held: dict[int, int] = {}  # memory → its next use
    latest: list[tuple[int, int]] = []  # heap of (-next use, memory), with entries that are no longer true
    hits = 0
    for step, memory in enumerate(memories):
        hits += memory in held and step >= never - QUESTIONS
        held[memory] = next_use[step]
        heapq.heappush(latest, (-next_use[step], memory))
        while len(held) > room:
            use, candidate = heapq.heappop(latest)
            if held.get(candidate) == -use:
                del held[candidate]
    return hits / QUESTIONS


def _touch(held: OrderedDict[int, None], memory: int, room: int) -> bool:
    hit = memory in held
    held[memory] = None
    held.move_to_end(memory)
    if len(held) > room:
        held.popitem(last=False)
    return hit


def _routers(run: Run) -> dict[str, Choose]:
    by_bound_alone = {f"{OURS}, unhurried 1": _ours(run.replicas, unhurried=1)} if run.mean < 4 else {}
    return {
        OURS: _ours(run.replicas),
        **by_bound_alone,
        RING: _ring_choice(run.replicas),
        POWER_OF_TWO: _power_of_two(run.replicas),
    }


def _ours(replicas: int, unhurried: int = 4) -> Choose:
    routing = MemoryRouting(unhurried=unhurried)
    routing.set_ranks(range(replicas))
    names = [str(memory) for memory in range(MEMORIES)]
    return lambda memory, loads: next(routing.candidates(names[memory], loads, MAX_ONGOING), None)


def _ring_choice(replicas: int) -> Choose:
    names = _names(replicas)
    index = {name: i for i, name in enumerate(names)}
    tried = [[index[each.unique_id] for each in ranked] for ranked in _rank_on_ring(names)]
    return lambda memory, loads: next((each for each in tried[memory] if loads[each] < MAX_ONGOING), None)


def _power_of_two(replicas: int) -> Choose:
    draw = random.Random(SEED)

    def choose(memory: int, loads: Sequence[int]) -> int | None:
        shorter = min(draw.sample(range(replicas), 2), key=loads.__getitem__)
        return shorter if loads[shorter] < MAX_ONGOING else None

    return choose


def _measure_moved(router: str, replicas: int) -> dict[str, float]:
    """Share of the memories whose home is another replica after each event; nothing has a home with power of two."""
    if router == POWER_OF_TWO:
        return {}
    middle, *names = replicas // 2, *_names(replicas + 2)
    before, joining, replacing = names[:replicas], names[replicas], names[replicas + 1]
    without = [name for name in before if name != before[middle]]
    restarted = [replacing if name == before[middle] else name for name in before]
    if router == RING:
        homes = {
            "dies": _ring_homes(without),
            "joins": _ring_homes([*before, joining]),
            "restarts": [before[middle] if name == replacing else name for name in _ring_homes(restarted)],
            "leaves": _ring_homes(without),
        }
        return {event: _share_moved(_ring_homes(before), after) for event, after in homes.items()}
    ranks = dict(enumerate(before))
    renumbered = {**ranks, middle: before[-1]}  # the last one takes the rank that became free
    del renumbered[replicas - 1]
    homes = {
        "dies": _our_homes({rank: name for rank, name in ranks.items() if rank != middle}),
        "joins": _our_homes({**ranks, replicas: joining}),
        "restarts": _our_homes(ranks),  # the one that replaces it has its rank
        "leaves": _our_homes(renumbered),
    }
    return {event: _share_moved(_our_homes(ranks), after) for event, after in homes.items()}


def _our_homes(ranks: dict[int, str]) -> list[str]:
    routing, names = MemoryRouting(), list(ranks.values())
    routing.set_ranks(list(ranks))
    return [names[routing.order(str(memory))[0]] for memory in range(MEMORIES)]


def _ring_homes(names: list[str]) -> list[str]:
    return [ranked[0].unique_id for ranked in _rank_on_ring(names)]


def _rank_on_ring(names: list[str]) -> list[list[ReplicaID]]:
    """For each memory the replicas that Serve's own ring would try; the class is given just what its ring needs."""
    deployment = DeploymentID("simulated")
    router = ConsistentHashRouter.__new__(ConsistentHashRouter)
    router._deployment_id = deployment
    router.initialize_state()
    router._rebuild_ring(frozenset(ReplicaID(name, deployment) for name in names))
    return [router._lookup_ranked_replicas(str(memory)) for memory in range(MEMORIES)]


def _share_moved(before: list[str], after: list[str]) -> float:
    return sum(old != new for old, new in zip(before, after, strict=True)) / MEMORIES


def _names(replicas: int) -> list[str]:
    """Ids as Serve makes them: eight random letters and digits."""
    draw = random.Random(SEED)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=8)) for _ in range(replicas)]


def _frequencies(zipf: float) -> npt.NDArray[np.float64]:
    weights: npt.NDArray[np.float64] = np.arange(1, MEMORIES + 1, dtype=float) ** -zipf
    weights /= weights.sum()
    return weights


if __name__ == "__main__":
    main()
