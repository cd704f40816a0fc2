"""The object-store tier of one node: memories in Ray's shared memory, for the engines on that node to read.

One detached `MemoryKeeper` actor a node. It reads what it lacks from the durable tier and puts its own copies,
since an object dies with the process that put it. Everything here may vanish at any time and is read again:
a reader whose `ray.get` fails because the keeper or its node died asks `chunks` once more.
"""

import asyncio
import contextlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memory_worker.manifest import FileEntry, Manifest, MemoryShape
from memory_worker.messages import MemoryKey
from memory_worker.store import MemoryStore

NAMESPACE = "memorag"
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class KeptMemory:
    """One version of a memory in the object store, in slot order: the head, then each document.

    `ray.get(chunks[i])` is a read-only numpy array, in shared memory, of
    `[2, layers, slots[i], kv_heads, head_dim]`: keys before RoPE, then values. Its dtype is float32, or uint16
    holding the bits of a 16-bit `shape.dtype` (`memory_worker.segments.as_torch` makes the tensor).
    """

    key: MemoryKey
    fingerprint: str  # of the memory model that encoded it
    shape: MemoryShape
    chunks: tuple[ray.ObjectRef, ...]
    slots: tuple[int, ...]  # of each chunk

    @property
    def total_slots(self) -> int:
        return sum(self.slots)


@dataclass(frozen=True, slots=True)
class KeeperStats:
    """What one keeper holds, and what it did since it started."""

    bytes: int
    budget_bytes: int
    segments: int
    hits: int  # segments found in the object store
    loads: int  # segments read from the durable tier
    evictions: int


@dataclass(slots=True)
class _KeptSegment:
    chunks: list[ray.ObjectRef]
    slots: list[int]
    bytes: int
    readers: int = field(default=0)  # calls that are about to hand it out


class MemoryKeeper:
    """Keeps segments by their file's digest, so that versions share the documents they have in common.

    Least recently used segments are let go when a new one would exceed the budget, but none that a call in
    progress is handing out: a memory larger than the budget is still kept whole while it is asked for, and its
    bytes stay in the object store for as long as a reader holds the references.
    """

    def __init__(self, storage_root: str, budget_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._store = MemoryStore(storage_root)
        self._budget = budget_bytes
        self._chunk_bytes = chunk_bytes
        self._segments: OrderedDict[str, _KeptSegment] = OrderedDict()  # by digest, least recently used first
        self._loading: dict[str, asyncio.Task[_KeptSegment]] = {}
        self._bytes = self._hits = self._loads = self._evictions = 0

    async def chunks(self, key: MemoryKey) -> KeptMemory:
        """The memory in the object store, loaded if it was not there; calls at the same time load it once.

        Raises `MemoryNotFound`, or `DamagedFile` naming the file that is not as it was written.
        """
        manifest = await asyncio.to_thread(self._store.read_manifest, key)
        parts = [(manifest.head, manifest.head_slots), *((d.segment, d.slots) for d in manifest.documents)]
        with contextlib.ExitStack() as held:
            segments = []
            for file, slots in parts:
                segment = await self._segment(file, slots, manifest)
                segment.readers += 1
                held.callback(_release, segment)
                segments.append(segment)
            return KeptMemory(
                key,
                manifest.fingerprint,
                manifest.shape,
                tuple(chunk for segment in segments for chunk in segment.chunks),
                tuple(count for segment in segments for count in segment.slots),
            )

    async def stats(self) -> KeeperStats:
        return KeeperStats(self._bytes, self._budget, len(self._segments), self._hits, self._loads, self._evictions)

    async def _segment(self, file: FileEntry, slots: int, manifest: Manifest) -> _KeptSegment:
        if file.digest in self._segments:
            self._hits += 1
            self._segments.move_to_end(file.digest)
            return self._segments[file.digest]
        task = self._loading.get(file.digest)
        if task is None:
            task = asyncio.create_task(self._load(file, slots, manifest))
            self._loading[file.digest] = task
            task.add_done_callback(lambda _: self._loading.pop(file.digest))
        return await asyncio.shield(task)  # a caller who gives up does not take the others' load with him

    async def _load(self, file: FileEntry, slots: int, manifest: Manifest) -> _KeptSegment:
        size = slots * manifest.shape.slot_bytes
        self._evict(size)
        self._bytes += size  # while it is read, so that loads at the same time share the budget
        try:
            loaded = await asyncio.to_thread(self._read, file, slots, manifest.shape)
        except BaseException:
            self._bytes -= size
            raise
        self._segments[file.digest] = loaded
        self._loads += 1
        return loaded

    def _read(self, file: FileEntry, slots: int, shape: MemoryShape) -> _KeptSegment:
        segment = self._store.read_segment(file)
        segment.expect(shape, slots)
        kept = _KeptSegment([], [], slots * shape.slot_bytes)
        for chunk in segment.chunks(self._chunk_bytes):
            kept.chunks.append(ray.put(chunk))
            kept.slots.append(chunk.shape[2])
        return kept

    def _evict(self, coming_bytes: int) -> None:
        """Lets go of unused segments until `coming_bytes` more fit the budget, as far as that is possible."""
        for digest in [digest for digest, segment in self._segments.items() if not segment.readers]:
            if self._bytes + coming_bytes <= self._budget:
                return
            self._bytes -= self._segments.pop(digest).bytes
            self._evictions += 1


def keeper_on(
    node_id: str, storage_root: str, budget_bytes: int, namespace: str = NAMESPACE
) -> "ray.actor.ActorHandle":
    """The keeper of this node, started if there is none. A keeper that dies comes back empty."""
    actor: Any = ray.remote(MemoryKeeper)
    return actor.options(
        name=f"memory-keeper-{node_id}",
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(storage_root, budget_bytes)


def local_keeper(storage_root: str, budget_bytes: int, namespace: str = NAMESPACE) -> "ray.actor.ActorHandle":
    """The keeper of the caller's own node."""
    return keeper_on(ray.get_runtime_context().get_node_id(), storage_root, budget_bytes, namespace)


def _release(segment: _KeptSegment) -> None:
    segment.readers -= 1
