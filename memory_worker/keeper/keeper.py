"""The object-store tier of one node: memories in Ray's shared memory, for the engines on that node to read.

One detached `MemoryKeeper` actor a node. It takes what it lacks from a peer on another node, or reads it from the
durable tier, and puts its own copies, since an object dies with the process that put it. Everything here may vanish at
any time and is read again: a reader whose `ray.get` fails because the keeper or its node died asks `chunks` once more.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TypeVar
from weakref import WeakValueDictionary

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import lasting_actor
from cluster.shared_cache import SharedCache
from cluster.storage.durable import StoredFile
from memory_worker.errors import DamagedMemory, MixedMemories
from memory_worker.head_pools import Counts
from memory_worker.keeper.peers import KEEPER, HeldFile, Peers, put_copies
from memory_worker.keeper.tier_metrics import TierMetrics
from memory_worker.manifest import Manifest, MemoryKey, MemoryShape, SegmentEntry
from memory_worker.messages import SegmentGroup
from memory_worker.storage.store import MemoryStore

NAMESPACE = "memorag"
CHUNK_BYTES = 64 * 2**20
_READERS = 32  # threads that read from storage
_READERS_OF_ONE_MEMORY = 4  # of them, so that a memory whose storage hangs does not take them all
_KEPT_DOCUMENTS = 20_000  # entries of manifests kept, some kilobytes each

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class KeptMemory:
    """A group of segments in the object store, in slot order: the head, then each segment.

    `ray.get(chunks[i])` is a read-only numpy array, in shared memory, of
    `[2, layers, slots[i], kv_heads, head_dim]`: keys before RoPE, then values. Its dtype is float32, or uint16
    holding the bits of a 16-bit `shape.dtype` (`memory_worker.storage.segments.as_torch` makes the tensor).
    """

    group: SegmentGroup
    fingerprint: str  # of the memory model that encoded it
    shape: MemoryShape
    chunks: tuple[ray.ObjectRef, ...]
    slots: tuple[int, ...]  # of each chunk
    pools: tuple[tuple[int, Counts], ...] = ()  # the first slot of each pool, where heads have budgets, and its counts

    @property
    def total_slots(self) -> int:
        return sum(self.slots)


@dataclass(slots=True)
class KeeperStats:
    """What one keeper holds, and what it did since it started."""

    budget_bytes: int
    bytes: int = 0  # also of what is being read now
    segments: int = 0  # files of them
    hits: int = 0  # files found in the object store
    loads: int = 0  # files read from the durable tier
    evictions: int = 0
    pulls: int = 0  # files taken from a peer
    slots: int = 0  # of the segments
    moved_bytes: int = 0  # that loads and pulls brought here


@dataclass(slots=True)
class _KeptFile:
    file: HeldFile
    readers: int = field(default=0)  # calls that are about to hand it out


class MemoryKeeper:
    """Keeps segment files by tenant and digest, so that a tenant's versions share the documents they have in common.

    Tenants share nothing: how fast an answer comes must not tell what another tenant has asked about.

    Least recently used files are let go when a new one would exceed the budget, but none that a call in progress is
    handing out: a group larger than the budget is still kept whole while it is asked for, and its bytes stay in the
    object store for as long as a reader holds the references.

    Versions are immutable, so their manifests are kept too: what is in the object store is handed out without
    touching storage, however slow that is.
    """

    def __init__(
        self, storage_root: str, budget_bytes: int, chunk_bytes: int = CHUNK_BYTES, namespace: str = NAMESPACE
    ) -> None:
        self._store = MemoryStore(storage_root)
        self._chunk_bytes = chunk_bytes
        self._manifests: SharedCache[Manifest] = SharedCache(
            _KEPT_DOCUMENTS, lambda manifest: len(manifest.documents), keep_one=True
        )
        self._files: OrderedDict[tuple[str, str], _KeptFile] = OrderedDict()  # by tenant and digest; the last used last
        self._loading: SharedCache[_KeptFile] = SharedCache(0)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by tenant/memory
        self._peers = Peers(namespace)
        self._metrics = TierMetrics()
        self._stats = KeeperStats(budget_bytes)

    async def chunks(self, group: SegmentGroup) -> KeptMemory:
        """The group in the object store, loaded as far as it was not there; calls at the same time load it once.

        Raises `MemoryNotFound`, `MixedMemories`, `DamagedFile` naming the file that is not as it was written, or
        `ValueError` for segments that do not exist, that are not all one tenant's, or that have other slots.
        """
        if len({part.key.tenant for part in group.ranges}) != 1:
            raise ValueError(f"{group.name} must name segments of one tenant")
        manifests = [await self._manifest(part.key) for part in group.ranges]
        segments = _segments(group, manifests)
        shape = manifests[0].shape
        with contextlib.ExitStack() as held:
            wanted = [(key, file) for key, segment in segments for file in segment.files]
            kept = await self._hold(group.name, wanted, held)
            files = iter(kept)
            for _, segment in segments:
                _check(segment, shape, [next(files) for _ in segment.files])
            held_files = [kept_file.file for kept_file in kept]
            starts = accumulate((sum(file.slots) for file in held_files), initial=0)
            return KeptMemory(
                group,
                manifests[0].fingerprint,
                shape,
                tuple(chunk for file in held_files for chunk in file.chunks),
                tuple(count for file in held_files for count in file.slots),
                tuple(
                    (at, file.counts) for at, file in zip(starts, held_files, strict=False) if file.counts is not None
                ),
            )

    async def prefetch(self, group: SegmentGroup) -> bool:
        """Loads the group before it is asked for, if that evicts nothing; whether it is here. Raises as `chunks`."""
        manifests = [await self._manifest(part.key) for part in group.ranges]
        files = {
            (key.tenant, file.digest): file.size
            for key, segment in _segments(group, manifests)
            for file in segment.files
        }
        missing = sum(size for name, size in files.items() if name not in self._files)
        if self._stats.bytes + missing > self._stats.budget_bytes:
            return False
        await self.chunks(group)
        return True

    async def stats(self) -> KeeperStats:
        return replace(self._stats, segments=len(self._files))

    async def held(self, tenant: str, digest: str) -> HeldFile | None:
        """For a peer: the file if it is here. Its bytes stay for as long as the result is referred to."""
        if kept := self._files.get((tenant, digest)):
            self._files.move_to_end((tenant, digest))
            return kept.file
        return None

    async def _manifest(self, key: MemoryKey) -> Manifest:
        async def read() -> Manifest:
            async with self._turn(key):
                return await self._in_thread(partial(self._store.read_manifest, key))

        return await self._manifests.get(key, read)

    async def _hold(
        self, group: str, wanted: list[tuple[MemoryKey, StoredFile]], held: contextlib.ExitStack
    ) -> list[_KeptFile]:
        """These files of a group, each counted as read until `held` closes; missing ones are loaded together."""

        def hold(file: _KeptFile) -> _KeptFile:
            file.readers += 1
            held.callback(_release, file)
            return file

        async def load_once(key: MemoryKey, file: StoredFile) -> _KeptFile:
            return hold(await self._loading.get(file, partial(self._load, group, key, file)))

        found: dict[StoredFile, _KeptFile | BaseException] = {}
        missing: dict[StoredFile, MemoryKey] = {}
        for key, file in wanted:
            if kept := self._files.get((key.tenant, file.digest)):
                self._files.move_to_end((key.tenant, file.digest))
                self._stats.hits += 1
                self._metrics.count_hit(key.tenant)
                found[file] = hold(kept)
            else:
                missing[file] = key
        loads = await asyncio.gather(*(load_once(k, f) for f, k in missing.items()), return_exceptions=True)
        found |= zip(missing, loads, strict=True)
        files = []
        for _, file in wanted:
            result = found[file]
            if isinstance(result, BaseException):
                raise result
            files.append(result)
        return files

    async def _load(self, group: str, key: MemoryKey, file: StoredFile) -> _KeptFile:
        async with self._turn(key):
            self._evict(file.size)
            self._stats.bytes += file.size  # while it is read, so that loads at the same time share the budget
            try:
                pulled = await self._pull(group, key.tenant, file.digest)
                loaded = await self._in_thread(partial(self._read, file)) if pulled is None else pulled
            finally:
                self._stats.bytes -= file.size
        name = key.tenant, file.digest
        if name not in self._files:  # the same bytes may have come from another memory meanwhile
            self._files[name] = _KeptFile(loaded)
            self._stats.bytes += loaded.bytes
            self._stats.slots += sum(loaded.slots)
            self._stats.moved_bytes += loaded.bytes
            self._stats.pulls += pulled is not None
            self._stats.loads += pulled is None
            self._metrics.count_load(key.tenant, "peer" if pulled else "storage", loaded.bytes)
            self._metrics.set_resident(self._stats.bytes, self._stats.slots)
        return self._files[name]

    async def _pull(self, group: str, tenant: str, digest: str) -> HeldFile | None:
        """A copy of what a peer holds: it was verified when that peer read it."""
        fetched = await self._peers.fetch(group, tenant, digest)
        if fetched is None:
            return None
        held, arrays = fetched
        return replace(held, chunks=await self._in_thread(partial(put_copies, arrays)))

    def _read(self, file: StoredFile) -> HeldFile:
        segment = self._store.read_segment(file)
        chunks, slots = [], []
        for chunk in segment.chunks(self._chunk_bytes):
            chunks.append(ray.put(chunk))
            slots.append(chunk.shape[2])
        counts = None if segment.counts is None else segment.counts.copy()  # not a view of all of the file
        size = segment.slots * segment.shape.slot_bytes
        return HeldFile(segment.shape, tuple(chunks), tuple(slots), size, counts)

    def _turn(self, key: MemoryKey) -> asyncio.Semaphore:
        """To be held while storage is read for this memory."""
        memory = f"{key.tenant}/{key.memory}"
        return self._turns.setdefault(memory, asyncio.Semaphore(_READERS_OF_ONE_MEMORY))

    async def _in_thread(self, read: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    def _evict(self, coming_bytes: int) -> None:
        """Lets go of unused files until `coming_bytes` more fit the budget, as far as that is possible."""
        for name in [name for name, file in self._files.items() if not file.readers]:
            if self._stats.bytes + coming_bytes <= self._stats.budget_bytes:
                return
            gone = self._files.pop(name).file
            self._stats.bytes -= gone.bytes
            self._stats.slots -= sum(gone.slots)
            self._stats.evictions += 1
            self._metrics.count_eviction(gone.bytes)


def keeper_on(
    node_id: str, storage_root: str, budget_bytes: int, namespace: str = NAMESPACE
) -> "ray.actor.ActorHandle":
    """The keeper of this node, started if there is none. A keeper that dies comes back empty."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = lasting_actor(MemoryKeeper, KEEPER + node_id, namespace, scheduling_strategy=there)
    return actor.remote(storage_root, budget_bytes, namespace=namespace)


def local_keeper(storage_root: str, budget_bytes: int, namespace: str = NAMESPACE) -> "ray.actor.ActorHandle":
    """The keeper of the caller's own node."""
    return keeper_on(ray.get_runtime_context().get_node_id(), storage_root, budget_bytes, namespace)


def _segments(group: SegmentGroup, manifests: Sequence[Manifest]) -> list[tuple[MemoryKey, SegmentEntry]]:
    """The head and the segments that the group names, each with the version it is read for."""
    first = manifests[0]
    head = SegmentEntry(tokens=first.head_slots, slots=first.head_slots, files=(first.head,))
    named = [(group.ranges[0].key, head)]
    for part, manifest in zip(group.ranges, manifests, strict=True):
        if (manifest.fingerprint, manifest.shape) != (first.fingerprint, first.shape):
            raise MixedMemories(first.memory, manifest.memory)
        segments = manifest.segments
        if not part.first < part.end <= len(segments):
            raise ValueError(f"{part.key.path} has {len(segments)} segments, so there is no {part.first}-{part.end}")
        named += [(part.key, segment) for segment in segments[part.first : part.end]]
    slots = sum(segment.slots for _, segment in named)
    if slots != group.slots:
        raise ValueError(f"the request counts {group.slots} slots, but {group.name} has {slots}")
    return named


def _check(segment: SegmentEntry, shape: MemoryShape, files: list[_KeptFile]) -> None:
    slots = sum(sum(kept.file.slots) for kept in files)
    if slots != segment.slots or any(kept.file.shape != shape for kept in files):
        raise DamagedMemory(
            segment.files[0].path,
            f"begins a segment that holds {slots} slots of {files[0].file.shape}; "
            f"its manifest says {segment.slots} of {shape}",
        )


def _release(file: _KeptFile) -> None:
    file.readers -= 1
