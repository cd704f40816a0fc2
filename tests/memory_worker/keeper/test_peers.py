"""Which keepers of other nodes are asked for a file, however many there are."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.routing import MemoryRouting
from memory_worker.keeper import peers
from memory_worker.keeper.peers import KEEPER, HeldFile, Peers
from memory_worker.manifest import MemoryShape

NODES = [f"node{number}" for number in range(200)]
RANKS = dict(enumerate(reversed(NODES)))
MEMORY = "acme/book/v000001-00000000:0-1"
FILE = HeldFile(MemoryShape(layers=1, kv_heads=1, head_dim=8, dtype="float32"), (), (), 32)


class Keepers:
    """The keepers of many nodes, this process on the first; `holding` are those that have the file."""

    def __init__(self, monkeypatch: Any, ranks: dict[int, str]) -> None:
        self.holding: set[str] = set()
        self.silent: set[str] = set()
        self.dead: set[str] = set()
        self.asked: list[str] = []
        context = SimpleNamespace(get_node_id=lambda: NODES[0])
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(ray, "get_actor", self.keeper)
        monkeypatch.setattr(ray, "get", lambda references, timeout: references)
        monkeypatch.setattr(peers, "actor_names", lambda namespace, prefix: [prefix + node for node in NODES])
        monkeypatch.setattr(peers, "nodes_of_ranks", lambda namespace: ranks)
        monkeypatch.setattr(peers, "_ANSWER_S", 60.0)

    def keeper(self, name: str, namespace: str) -> Any:
        node = name.removeprefix(KEEPER)
        if node in self.dead:
            raise ValueError(name)

        async def held(tenant: str, digest: str) -> HeldFile | None:
            self.asked.append(node)
            if node in self.silent:
                await asyncio.Event().wait()
            return FILE if node in self.holding else None

        return SimpleNamespace(held=SimpleNamespace(remote=held))


@pytest.fixture
def order() -> list[str]:
    """The nodes that routing sends the memory's questions to, but this one."""
    routing = MemoryRouting()
    routing.set_ranks([*RANKS])
    nodes = [RANKS[rank] for rank in routing.order(MEMORY)]
    return [node for node in nodes if node != NODES[0]]


async def test_the_home_of_the_memory_is_asked_first_and_alone_where_it_has_the_file(monkeypatch, order) -> None:
    keepers = Keepers(monkeypatch, RANKS)
    keepers.holding = set(order)
    assert await Peers("tests").fetch(MEMORY, "acme", "digest") == (FILE, [])
    assert keepers.asked == order[:1]


async def test_of_many_peers_three_are_asked_for_a_cold_file(monkeypatch, order) -> None:
    keepers = Keepers(monkeypatch, RANKS)
    assert await Peers("tests").fetch(MEMORY, "acme", "digest") is None
    assert keepers.asked == order[:3]


async def test_the_next_is_asked_where_one_has_ended_or_does_not_answer(monkeypatch, order) -> None:
    keepers = Keepers(monkeypatch, RANKS)
    monkeypatch.setattr(peers, "_ANSWER_S", 2.0)
    keepers.dead, keepers.silent, keepers.holding = {order[0]}, {order[1]}, {order[2]}
    assert await Peers("tests").fetch(MEMORY, "acme", "digest") == (FILE, [])
    assert keepers.asked == order[1:3]


async def test_keepers_of_unknown_rank_are_hashed_by_their_nodes(monkeypatch) -> None:
    keepers = Keepers(monkeypatch, {})
    asked = set()
    for number in range(100):
        keepers.asked = []
        await Peers("tests").fetch(f"acme/book{number}/v1:0-1", "acme", "digest")
        assert len(set(keepers.asked)) == 3
        asked.add(keepers.asked[0])
    assert len(asked) > 50 and NODES[0] not in asked
