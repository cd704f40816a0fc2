"""One keeper per node holds its own copies, within its budget, and loses nothing that storage has."""

import asyncio
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from cluster.storage import DamagedFile
from memory_worker.errors import DamagedMemory, MemoryNotFound
from memory_worker.keeper import KeeperStats, KeptMemory, MemoryKeeper, keeper_on, local_keeper
from memory_worker.messages import MemoryKey
from memory_worker.segments import as_torch
from memory_worker.store import MemoryStore
from tests.memory_worker.actors import kill_and_await_restart
from tests.memory_worker.stored import HEAD_SLOTS, SHAPE, random_slots, store_memory

SLOT = SHAPE.slot_bytes
HEAD = HEAD_SLOTS * SLOT


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Two nodes; the ids of the first, which this process is on, and the second."""
    node = {"num_cpus": 2, "object_store_memory": 150 * 2**20}
    with tempfile.TemporaryDirectory(prefix="keep", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # else every Ray on this machine would find this cluster
        Path(folder, "ray").mkdir()
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        second = cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield [ray.get_runtime_context().get_node_id(), second.node_id]
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(str(tmp_path))


class Kept:
    """A keeper of this test alone."""

    def __init__(self, node: str, store: MemoryStore, budget: int) -> None:
        self.actor = keeper_on(node, store.storage.root, budget, f"test-{uuid.uuid4().hex}")

    def chunks(self, key: MemoryKey) -> KeptMemory:
        return ray.get(self.actor.chunks.remote(key))

    def stats(self) -> KeeperStats:
        return ray.get(self.actor.stats.remote())


@pytest.fixture
def kept(nodes: list[str], store: MemoryStore) -> Iterator[Any]:
    made: list[Kept] = []

    def make(budget: int = 2**20, node: int = 0) -> Kept:
        made.append(Kept(nodes[node], store, budget))
        return made[-1]

    yield make
    for keeper in made:
        ray.kill(keeper.actor)


def whole(memory: KeptMemory) -> torch.Tensor:
    """`[2, layers, kv_heads, slots, head_dim]`, read here."""
    arrays = ray.get(list(memory.chunks))
    assert all(not array.flags.writeable for array in arrays)
    assert [array.shape[2] for array in arrays] == list(memory.slots)
    return torch.cat([as_torch(array, memory.shape.dtype) for array in arrays], dim=2).transpose(2, 3)


def expected(documents: dict[str, tuple[int, int]]) -> torch.Tensor:
    parts = [(HEAD_SLOTS, 0), *documents.values()]
    return torch.cat([torch.stack(random_slots(SHAPE, slots, seed)) for slots, seed in parts], dim=3)


@pytest.mark.parametrize("node", [0, 1])
def test_a_memory_is_handed_out_in_slot_order(kept: Any, store: MemoryStore, node: int) -> None:
    documents = {"b": (40, 1), "a": (3, 2), "c": (16, 3)}
    key = store.new_version("acme", "book")
    manifest = store_memory(store, key, documents)
    keeper = kept(node=node)
    memory = keeper.chunks(key)
    assert (memory.key, memory.shape, memory.fingerprint) == (key, SHAPE, manifest.fingerprint)
    assert memory.total_slots == manifest.slots == 64
    assert torch.equal(whole(memory), expected(documents))
    assert keeper.stats() == KeeperStats(64 * SLOT, 2**20, segments=4, hits=0, loads=4, evictions=0)
    assert keeper.chunks(key).chunks == memory.chunks
    assert keeper.stats() == KeeperStats(64 * SLOT, 2**20, segments=4, hits=4, loads=4, evictions=0)


def test_versions_share_the_documents_they_have_in_common(kept: Any, store: MemoryStore) -> None:
    first, second = (MemoryKey("acme", "book", f"v00000{n}-00000000") for n in (1, 2))
    old = store_memory(store, first, {"one": (40, 1)})
    new = store_memory(store, second, {"two": (16, 2)}, publish=False)
    store.publish(new.model_copy(update={"documents": old.documents + new.documents}))
    keeper = kept()
    memories = [keeper.chunks(first), keeper.chunks(second)]
    assert memories[1].chunks[:2] == memories[0].chunks and keeper.stats().loads == 3
    assert torch.equal(whole(memories[1]), expected({"one": (40, 1), "two": (16, 2)}))


async def test_calls_at_the_same_time_load_once(kept: Any, store: MemoryStore) -> None:
    keys = [store.new_version("acme", name) for name in ("m1", "m2")]
    for seed, key in enumerate(keys):
        store_memory(store, key, {"one": (40, 10 + seed)})
    keeper = kept()
    memories = await asyncio.gather(*(keeper.actor.chunks.remote(key) for key in keys * 20))
    assert {m.chunks for m in memories if m.key == keys[0]} == {memories[0].chunks}
    assert keeper.stats().loads == 3  # the two heads have the same bytes


def test_least_recently_used_segments_go_first(kept: Any, store: MemoryStore) -> None:
    keys = {name: store.new_version("acme", name) for name in "abc"}
    for seed, (name, key) in enumerate(keys.items()):
        store_memory(store, key, {name: (100, 20 + seed)})
    keeper = kept(budget=HEAD + 250 * SLOT)
    for name in "abac":
        keeper.chunks(keys[name])
    stats = keeper.stats()
    assert (stats.evictions, stats.segments, stats.bytes) == (1, 3, HEAD + 200 * SLOT)
    keeper.chunks(keys["a"])
    assert keeper.stats().loads == stats.loads  # b went, a stayed
    keeper.chunks(keys["b"])
    assert keeper.stats().loads == stats.loads + 1


def test_a_memory_beyond_the_budget_is_still_whole(kept: Any, store: MemoryStore) -> None:
    documents = {"one": (400, 30), "two": (300, 31)}
    large, small = store.new_version("acme", "large"), store.new_version("acme", "small")
    store_memory(store, large, documents)
    store_memory(store, small, {"s": (10, 32)})
    keeper = kept(budget=100 * SLOT)
    keeper.chunks(small)
    memory = keeper.chunks(large)
    assert torch.equal(whole(memory), expected(documents))
    assert keeper.stats().bytes == HEAD + 700 * SLOT
    keeper.chunks(small)
    assert keeper.stats().bytes <= 100 * SLOT
    assert torch.equal(whole(memory), expected(documents)), "what a reader holds stays readable after eviction"


def test_the_keeper_owns_its_copies(kept: Any, store: MemoryStore, nodes: list[str]) -> None:
    """A first caller on the other node asks, reads and dies; a keeper that itself dies comes back empty."""
    key = store.new_version("acme", "book")
    store_memory(store, key, {"one": (40, 1)})
    keeper = kept()

    @ray.remote(num_cpus=0)
    class Caller:
        def read(self, keeper: Any) -> int:
            self.memory = ray.get(keeper.chunks.remote(key))
            return sum(array.shape[2] for array in ray.get(list(self.memory.chunks)))

    caller = Caller.remote()
    assert ray.get(caller.read.remote(keeper.actor)) == 45
    ray.kill(caller)
    assert torch.equal(whole(keeper.chunks(key)), expected({"one": (40, 1)}))
    assert keeper.stats().loads == 2
    kill_and_await_restart(keeper.actor)
    assert torch.equal(whole(keeper.chunks(key)), expected({"one": (40, 1)}))
    assert keeper.stats().hits == 0


def test_damage_and_absence_are_errors_and_nothing_stays_behind(kept: Any, store: MemoryStore, tmp_path: Path) -> None:
    key = store.new_version("acme", "book")
    manifest = store_memory(store, key, {"one": (40, 1)}, publish=False)
    keeper = kept()
    with pytest.raises(MemoryNotFound):
        keeper.chunks(key)
    store.publish(manifest)
    path = tmp_path / manifest.documents[0].segment.path
    good = path.read_bytes()
    path.unlink()
    with pytest.raises(DamagedFile, match="is missing"):
        keeper.chunks(key)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DamagedFile, match="does not match its SHA-256"):
        keeper.chunks(key)
    assert keeper.stats().bytes == HEAD
    path.unlink()
    path.write_bytes(good)
    assert keeper.chunks(key).total_slots == 45

    lying = store.new_version("acme", "lying")
    made = store_memory(store, lying, {"one": (30, 2)}, publish=False)
    document = made.documents[0].model_copy(update={"slots": 31})
    store.publish(made.model_copy(update={"documents": (document,)}))
    with pytest.raises(DamagedMemory, match="holds 30 slots"):
        keeper.chunks(lying)


def test_one_keeper_a_node(nodes: list[str], store: MemoryStore) -> None:
    namespace = f"test-{uuid.uuid4().hex}"
    here = local_keeper(store.storage.root, 10, namespace)
    same, there = (keeper_on(node, store.storage.root, 10, namespace) for node in nodes)
    assert here._actor_id == same._actor_id != there._actor_id

    def node_of(actor: Any) -> str:
        return ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))

    assert [node_of(here), node_of(there)] == nodes
    for actor in (here, there):
        ray.kill(actor)


async def test_a_caller_who_gives_up_leaves_the_load_to_the_others(store: MemoryStore, nodes: list[str]) -> None:
    key = store.new_version("acme", "book")
    store_memory(store, key, {"one": (4000, 1)})
    keeper = MemoryKeeper(store.storage.root, 2**20)
    first, second = (asyncio.create_task(keeper.chunks(key)) for _ in range(2))
    async with asyncio.timeout(10):
        while not keeper._loading:  # noqa: ASYNC110  what is waited for is private to the keeper
            await asyncio.sleep(0)
    first.cancel()
    assert (await second).total_slots == 4005
    assert first.cancelled() and (await keeper.stats()).loads == 2
