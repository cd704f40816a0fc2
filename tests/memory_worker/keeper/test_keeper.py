"""One keeper per node holds its own copies, within its budget, and loses nothing that storage has."""

import asyncio
import os
import tempfile
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from benchmarks.support.stored_memories import HEAD_SLOTS, SHAPE, Seeded, random_slots, store_memory, whole
from cluster.ray_internals import patient_node
from cluster.storage.durable import DamagedFile
from memory_worker.errors import DamagedMemory, MemoryNotFound, MixedMemories
from memory_worker.keeper.keeper import KeeperStats, KeptMemory, MemoryKeeper, keeper_on, local_keeper
from memory_worker.manifest import Manifest, MemoryKey
from memory_worker.messages import SegmentGroup, SegmentRange
from memory_worker.storage.segments import as_torch
from memory_worker.storage.store import MemoryStore
from tests.support.killed_actors import kill_and_await_restart
from tests.support.local_actor import LocalActor
from tests.support.waiting import PATIENCE_S

SLOT = SHAPE.slot_bytes
HEAD = HEAD_SLOTS * SLOT


# Left to itself a node that is added is given up after 30 s, however busy the machine is.
NODE = {"num_cpus": 2, "object_store_memory": 150 * 2**20, "wait": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes; this process is on the first."""
    with (
        tempfile.TemporaryDirectory(prefix="keep", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
        patient_node(),
    ):
        patch.setenv("RAY_TMPDIR", folder)  # else every Ray on this machine would find this cluster
        Path(folder, "ray").mkdir()
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        cluster.wait_for_nodes(PATIENCE_S)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        cluster.add_node(**NODE)
        cluster.wait_for_nodes(PATIENCE_S)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[str]:
    """Their ids."""
    return [ray.get_runtime_context().get_node_id(), *(node.node_id for node in cluster.worker_nodes)]


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(str(tmp_path))


class Kept:
    """A keeper of this test alone: an actor of Ray on a node, or one in this process."""

    def __init__(self, store: MemoryStore, budget: int, node: str | None = None, namespace: str | None = None) -> None:
        namespace = namespace or f"test-{uuid.uuid4().hex}"
        self._here = node is None
        self.actor: Any
        if node is None:
            self.actor = LocalActor(partial(MemoryKeeper, namespace=namespace), store.storage.root, budget)
        else:
            self.actor = keeper_on(node, store.storage.root, budget, namespace)

    def chunks(self, group: SegmentGroup | Manifest) -> KeptMemory:
        return self._reply(self.actor.chunks.remote(whole(group) if isinstance(group, Manifest) else group))

    def prefetch(self, group: SegmentGroup) -> bool:
        return self._reply(self.actor.prefetch.remote(group))

    def stats(self) -> KeeperStats:
        return self._reply(self.actor.stats.remote())

    def end(self) -> None:
        if self._here:
            self.actor.end()
        else:
            ray.kill(self.actor)

    def _reply(self, call: Any) -> Any:
        return call.result() if self._here else ray.get(call)


@pytest.fixture
def kept(nodes: list[str], store: MemoryStore) -> Iterator[Any]:
    """Makes keepers: on a node, or in this process."""
    made: list[Kept] = []

    def make(budget: int = 2**20, node: int | None = None, namespace: str | None = None) -> Kept:
        made.append(Kept(store, budget, None if node is None else nodes[node], namespace))
        return made[-1]

    yield make
    for keeper in made:
        keeper.end()


def slots_of(memory: KeptMemory) -> torch.Tensor:
    """`[2, layers, kv_heads, slots, head_dim]`, read here."""
    arrays = ray.get(list(memory.chunks))
    assert all(not array.flags.writeable for array in arrays)
    assert [array.shape[2] for array in arrays] == list(memory.slots)
    return torch.cat([as_torch(array, memory.shape.dtype) for array in arrays], dim=2).transpose(2, 3)


def expected(*seeded: Seeded) -> torch.Tensor:
    """A head and these segments."""
    parts = [(HEAD_SLOTS, 0), *seeded]
    return torch.cat([torch.stack(random_slots(SHAPE, slots, seed)) for slots, seed in parts], dim=3)


@pytest.mark.parametrize("node", [0, 1])
def test_a_memory_is_handed_out_in_slot_order(kept: Any, store: MemoryStore, node: int) -> None:
    documents = {"b": (40, 1), "a": (3, 2), "c": (16, 3)}
    manifest = store_memory(store, store.new_version("acme", "book"), documents)
    keeper = kept(node=node)
    memory = keeper.chunks(manifest)
    assert (memory.group, memory.shape, memory.fingerprint) == (whole(manifest), SHAPE, manifest.fingerprint)
    assert memory.total_slots == manifest.slots == 64
    assert torch.equal(slots_of(memory), expected(*documents.values()))
    assert keeper.stats() == KeeperStats(
        2**20, bytes=64 * SLOT, segments=4, hits=0, loads=4, slots=64, moved_bytes=64 * SLOT
    )
    assert keeper.chunks(manifest).chunks == memory.chunks
    assert keeper.stats() == KeeperStats(
        2**20, bytes=64 * SLOT, segments=4, hits=4, loads=4, slots=64, moved_bytes=64 * SLOT
    )


def test_groups_of_several_memories_and_of_parts_of_them(kept: Any, store: MemoryStore) -> None:
    """Each segment of several files; a group's head is that of its first range."""
    book, log = (store.new_version("acme", name) for name in ("book", "log"))
    books = store_memory(store, book, {"a": [(40, 1), (20, 2)], "b": (33, 3)}, file_windows=1)
    logs = store_memory(store, log, {"c": [(50, 4), (7, 5)]}, file_windows=2)
    keeper = kept()
    memory = keeper.chunks(whole(books, logs))
    assert torch.equal(slots_of(memory), expected((40, 1), (20, 2), (33, 3), (50, 4), (7, 5)))
    assert keeper.stats().loads == 1 + 3 + 2 + 3 + 2 + 1
    parts = SegmentGroup((SegmentRange(log, 1, 2), SegmentRange(book, 1, 3)), HEAD_SLOTS + 7 + 20 + 33)
    assert torch.equal(slots_of(keeper.chunks(parts)), expected((7, 5), (20, 2), (33, 3)))
    assert keeper.stats().loads == 12


def test_what_makes_no_group_is_refused(kept: Any, store: MemoryStore) -> None:
    keys = [MemoryKey(tenant, name, "v000001-00000000") for tenant in ("acme", "evil") for name in ("a", "b", "c")]
    for key in keys:
        shape = SHAPE.model_copy(update={"dtype": "float16"}) if key.memory == "c" else SHAPE
        store_memory(store, key, {"d": (10, 1)}, shape=shape, fingerprint=key.memory.replace("c", "a") * 64)
    keeper = kept()
    for others, slots, error, message in [
        (keys[:1] + keys[3:4], 25, ValueError, "segments of one tenant"),
        (keys[:2], 25, MixedMemories, "'a' and 'b' were encoded by different models"),
        (keys[:3:2], 25, MixedMemories, "'a' and 'c' were .* as different kinds or in different dtypes"),
        (keys[:1], 16, ValueError, "counts 16 slots, but acme/a/v000001-00000000:0-1 has 15"),
    ]:
        with pytest.raises(error, match=message):
            keeper.chunks(SegmentGroup(tuple(SegmentRange(key, 0, 1) for key in others), slots))
    for first, end in [(0, 2), (1, 2), (1, 1), (1, 0)]:
        with pytest.raises(ValueError, match=f"has 1 segments, so there is no {first}-{end}"):
            keeper.chunks(SegmentGroup((SegmentRange(keys[0], first, end),), 15))
    assert keeper.stats().loads == 0


def test_versions_share_the_documents_they_have_in_common(kept: Any, store: MemoryStore) -> None:
    first, second = (MemoryKey("acme", "book", f"v00000{n}-00000000") for n in (1, 2))
    old = store_memory(store, first, {"one": (40, 1)})
    new = store_memory(store, second, {"two": (16, 2)}, publish=False)
    new = new.model_copy(update={"documents": old.documents + new.documents})
    store.publish(new)
    keeper = kept()
    memories = [keeper.chunks(old), keeper.chunks(new)]
    assert memories[1].chunks[:2] == memories[0].chunks and keeper.stats().loads == 3
    assert torch.equal(slots_of(memories[1]), expected((40, 1), (16, 2)))


def test_tenants_share_nothing_that_an_answers_speed_could_tell(kept: Any, store: MemoryStore) -> None:
    ours, theirs = (store_memory(store, store.new_version(t, "book"), {"one": (40, 1)}) for t in ("acme", "other"))
    assert ours.documents[0].segments[0].files[0].digest == theirs.documents[0].segments[0].files[0].digest
    keeper = kept()
    first = keeper.chunks(ours)
    second = keeper.chunks(theirs)
    assert not set(first.chunks) & set(second.chunks)
    assert (keeper.stats().loads, keeper.stats().hits) == (4, 0)


async def test_calls_at_the_same_time_load_once(kept: Any, store: MemoryStore) -> None:
    manifests = [
        store_memory(store, store.new_version("acme", name), {"one": (40, 10 + seed)})
        for seed, name in enumerate(("m1", "m2"))
    ]
    keeper = kept()
    memories = await asyncio.gather(*(keeper.actor.chunks.remote(whole(m)) for m in manifests * 20))
    assert {m.chunks for m in memories if m.group == whole(manifests[0])} == {memories[0].chunks}
    assert (await keeper.actor.stats.remote()).loads == 3  # the two heads have the same bytes


def test_least_recently_used_segments_go_first(kept: Any, store: MemoryStore) -> None:
    memories = {
        name: store_memory(store, store.new_version("acme", name), {name: (100, 20 + seed)})
        for seed, name in enumerate("abc")
    }
    keeper = kept(budget=HEAD + 250 * SLOT)
    for name in "abac":
        keeper.chunks(memories[name])
    stats = keeper.stats()
    assert (stats.evictions, stats.segments, stats.bytes) == (1, 3, HEAD + 200 * SLOT)
    keeper.chunks(memories["a"])
    assert keeper.stats().loads == stats.loads  # b went, a stayed
    keeper.chunks(memories["b"])
    assert keeper.stats().loads == stats.loads + 1


def test_a_memory_beyond_the_budget_is_still_whole(kept: Any, store: MemoryStore) -> None:
    large = store_memory(store, store.new_version("acme", "large"), {"one": (400, 30), "two": (300, 31)})
    small = store_memory(store, store.new_version("acme", "small"), {"s": (10, 32)})
    keeper = kept(budget=100 * SLOT)
    keeper.chunks(small)
    memory = keeper.chunks(large)
    assert torch.equal(slots_of(memory), expected((400, 30), (300, 31)))
    assert keeper.stats().bytes == HEAD + 700 * SLOT
    keeper.chunks(small)
    assert keeper.stats().bytes <= 100 * SLOT
    assert torch.equal(slots_of(memory), expected((400, 30), (300, 31))), "what is held stays readable after eviction"


def test_the_keeper_owns_its_copies(kept: Any, store: MemoryStore, nodes: list[str]) -> None:
    """A first caller on the other node asks, reads and dies; a keeper that itself dies comes back empty."""
    manifest = store_memory(store, store.new_version("acme", "book"), {"one": (40, 1)})
    keeper, group = kept(node=0), whole(manifest)

    @ray.remote(num_cpus=0, lifetime="detached")  # it dies when it is told to, and not by a count of references
    class Caller:
        def read(self, keeper: Any) -> int:
            self.memory = ray.get(keeper.chunks.remote(group))
            return sum(array.shape[2] for array in ray.get(list(self.memory.chunks)))

    caller: Any = Caller.remote()  # type: ignore[attr-defined]  # Ray's decorator
    assert ray.get(caller.read.remote(keeper.actor)) == 45
    ray.kill(caller)
    assert torch.equal(slots_of(keeper.chunks(group)), expected((40, 1)))
    assert keeper.stats().loads == 2
    kill_and_await_restart(keeper.actor)
    assert torch.equal(slots_of(keeper.chunks(group)), expected((40, 1)))
    assert keeper.stats().hits == 0


def test_damage_and_absence_are_errors_and_nothing_stays_behind(kept: Any, store: MemoryStore, tmp_path: Path) -> None:
    manifest = store_memory(store, store.new_version("acme", "book"), {"one": (40, 1)}, publish=False)
    keeper = kept()
    with pytest.raises(MemoryNotFound):
        keeper.chunks(manifest)
    store.publish(manifest)
    path = tmp_path / manifest.segments[0].files[0].path
    good = path.read_bytes()
    path.unlink()
    with pytest.raises(DamagedFile, match="is missing"):
        keeper.chunks(manifest)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DamagedFile, match="does not match its SHA-256"):
        keeper.chunks(manifest)
    assert keeper.stats().bytes == HEAD
    path.unlink()
    path.write_bytes(good)
    assert keeper.chunks(manifest).total_slots == 45

    made = store_memory(store, store.new_version("acme", "lying"), {"one": (30, 2)}, publish=False)
    segment = made.segments[0].model_copy(update={"slots": 31})
    document = made.documents[0].model_copy(update={"segments": (segment,)})
    lying = made.model_copy(update={"documents": (document,)})
    store.publish(lying)
    with pytest.raises(DamagedMemory, match="holds 30 slots"):
        keeper.chunks(lying)


def test_what_is_kept_is_handed_out_while_storage_is_gone(kept: Any, store: MemoryStore, tmp_path: Path) -> None:
    manifests = [
        store_memory(store, store.new_version("acme", name), {"one": [(40, 1), (9, seed)]}, file_windows=1)
        for seed, name in enumerate(("a", "b"), 2)
    ]
    keeper = kept()
    for manifest in manifests:
        keeper.chunks(manifest)
    loads = keeper.stats().loads
    (tmp_path / "acme").rename(tmp_path / "gone")
    assert torch.equal(slots_of(keeper.chunks(whole(*manifests))), expected((40, 1), (9, 2), (40, 1), (9, 3)))
    part = SegmentGroup((SegmentRange(whole(manifests[1]).ranges[0].key, 1, 2),), HEAD_SLOTS + 9)
    assert torch.equal(slots_of(keeper.chunks(part)), expected((9, 3)))
    assert keeper.stats().loads == loads
    other = store.new_version("acme", "c")
    with pytest.raises(MemoryNotFound):
        keeper.chunks(SegmentGroup((SegmentRange(other, 0, 1),), 9))


def test_a_memory_whose_storage_hangs_holds_up_no_other(kept: Any, store: MemoryStore, tmp_path: Path) -> None:
    """A file that nobody writes to in place of each segment: to open it waits for ever, in the kernel."""
    ready, cold, hangs = (store.new_version("acme", name) for name in ("ready", "cold", "hangs"))
    ready_manifest = store_memory(store, ready, {"one": (40, 1)})
    cold_manifest = store_memory(store, cold, {"one": (30, 2)})
    hanging = store_memory(store, hangs, {f"d{i}": (10, 10 + i) for i in range(40)})
    keeper = kept(node=0)
    keeper.chunks(ready_manifest)
    for file in (hanging.head, *(file for segment in hanging.segments for file in segment.files)):
        path = tmp_path / file.path
        path.unlink()
        os.mkfifo(path)
    asked = [
        keeper.actor.chunks.remote(SegmentGroup((SegmentRange(hangs, first, first + 1),), HEAD_SLOTS + 10))
        for first in range(40)
    ]
    assert ray.wait(asked, timeout=2)[0] == []
    for _ in range(20):
        assert torch.equal(slots_of(keeper.chunks(ready_manifest)), expected((40, 1)))
    assert torch.equal(slots_of(keeper.chunks(cold_manifest)), expected((30, 2)))
    assert ray.wait(asked, timeout=0)[0] == []


@pytest.mark.long
def test_a_node_that_is_lost_takes_no_memory_with_it(
    kept: Any, store: MemoryStore, cluster: Cluster, nodes: list[str]
) -> None:
    manifest = store_memory(store, store.new_version("acme", "book"), {"one": (40, 1), "two": (20, 2)})
    third = cluster.add_node(**NODE)
    cluster.wait_for_nodes(PATIENCE_S)
    lost = Kept(store, 2**20, third.node_id)
    memory = lost.chunks(manifest)
    cluster.remove_node(third)
    with pytest.raises(ray.exceptions.RayError):
        lost.chunks(manifest)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(list(memory.chunks))
    for node in (0, 1):
        keeper = kept(node=node)
        assert torch.equal(slots_of(keeper.chunks(manifest)), expected((40, 1), (20, 2)))
        assert keeper.stats().loads == 3


def test_a_miss_is_served_by_a_peer_before_storage(kept: Any, store: MemoryStore, nodes: list[str]) -> None:
    manifest = store_memory(store, store.new_version("acme", "book"), {"one": (40, 1), "two": (20, 2)})
    namespace = f"test-{uuid.uuid4().hex}"
    here, there = kept(node=0, namespace=namespace), kept(node=1, namespace=namespace)
    here.chunks(manifest)
    for segment in manifest.segments:
        for file in segment.files:
            Path(store.storage.root, file.path).unlink()
    memory = there.chunks(manifest)
    assert (there.stats().pulls, there.stats().loads) == (3, 0)
    assert there.stats().moved_bytes == 60 * SLOT + HEAD
    ray.kill(here.actor)  # what a peer put ends with it: the copies are one's own
    assert torch.equal(slots_of(memory), expected((40, 1), (20, 2)))
    assert torch.equal(slots_of(there.chunks(manifest)), expected((40, 1), (20, 2)))
    assert there.stats().moved_bytes == 60 * SLOT + HEAD, "a warm question moves nothing"


def test_a_peer_of_another_namespace_or_tenant_gives_nothing(kept: Any, store: MemoryStore) -> None:
    mine = store_memory(store, store.new_version("acme", "book"), {"one": (40, 1)})
    same = store_memory(store, store.new_version("other", "book"), {"one": (40, 1)})
    namespace = f"test-{uuid.uuid4().hex}"
    here, there, apart = kept(node=0, namespace=namespace), kept(node=1, namespace=namespace), kept()
    here.chunks(mine)
    there.chunks(same)
    apart.chunks(mine)
    assert (there.stats().pulls, there.stats().loads) == (apart.stats().pulls, apart.stats().loads) == (0, 2)


def test_what_is_prefetched_takes_nobodys_place(kept: Any, store: MemoryStore) -> None:
    one = store_memory(store, store.new_version("acme", "one"), {"a": (40, 1)})
    two = store_memory(store, store.new_version("acme", "two"), {"b": (40, 2)})
    keeper = kept(budget=HEAD + 60 * SLOT)
    assert keeper.prefetch(whole(one)) and keeper.stats().loads == 2
    before = keeper.stats()
    assert not keeper.prefetch(whole(two))
    assert (keeper.stats().loads, keeper.stats().evictions) == (before.loads, 0)
    assert torch.equal(slots_of(keeper.chunks(one)), expected((40, 1)))
    assert keeper.stats().loads == before.loads, "it was there already"


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
    manifest = store_memory(store, store.new_version("acme", "book"), {"one": (4000, 1)})
    keeper = MemoryKeeper(store.storage.root, 2**20)
    first, second = (asyncio.create_task(keeper.chunks(whole(manifest))) for _ in range(2))
    while not keeper._loading:  # noqa: ASYNC110  what is waited for is private to the keeper
        await asyncio.sleep(0)
    first.cancel()
    assert (await second).total_slots == 4005
    assert first.cancelled() and (await keeper.stats()).loads == 2
