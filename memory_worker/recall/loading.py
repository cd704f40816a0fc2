"""From the object store into paged KV blocks: what the vLLM connector does in each worker process.

A group's slots are fetched from the node's MemoryKeeper, their keys rotated to their slots, this rank's heads cut
out, and written with the attention backend's own cache writer (its layout is its secret). Pools of slots that heads
share (`head_pools`) come first in the cache, so that they are whole blocks of it; their keys stand where they
stood all the same.
"""

import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch
from torch import Tensor

from cluster.errors import MessageError
from memory_worker.head_pools import POOL_BLOCK, Counts, pool_slots, slot_order
from memory_worker.manifest import MemoryShape
from memory_worker.messages import SegmentGroup
from memory_worker.models.beacon.rope import Rope
from memory_worker.models.fingerprint import KINDS, fingerprint_of
from memory_worker.recall.head_tables import MemoryHeads
from memory_worker.storage.segments import as_torch

if TYPE_CHECKING:
    from memory_worker.keeper.keeper import KeptMemory

_TAILS = 64  # groups whose last, partial block stays rotated: each question to them writes it again
_KNOWN_GROUPS = 1024  # of which it is known how many pairs each head has: some 100 KB where heads have budgets


class LoadFailed(MessageError):
    """A group of segments cannot be put into the cache; the message says why."""


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots `start` to `end` of a prompt whose first `slots` are a group's, and the cache blocks of its first slots."""

    group: str  # SegmentGroup.name
    slots: int
    start: int
    end: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class LoadStats:
    """What one worker has loaded since it started."""

    fetched: int = 0  # times a group was asked of the keeper
    rotated_slots: int = 0
    tail_hits: int = 0  # loads served from a tail kept rotated
    failed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One attention layer of this worker: its index in the whole model, its cache writer, and whether it attends by
    head, as memories whose heads share slots need it."""

    index: int
    write: Callable[[Tensor, Tensor, Tensor], None]  # keys, values [slots, heads, head_dim], slot mapping [slots] int64
    by_head: bool = False


class Expected(NamedTuple):
    """What a memory must be to be read by this engine."""

    layers: int
    kv_heads: int  # of the whole model
    head_dim: int
    fingerprint: str | None  # of the memory model, that of any kind made with it will do; none accepts any


class MemoryLoader:
    """Loads slot ranges of groups. `fetch` returns what the keeper holds, or raises."""

    def __init__(
        self,
        fetch: Callable[[SegmentGroup], "KeptMemory"],
        rope: Rope,
        expected: Expected,
        *,
        heads: slice,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._fetch = fetch
        self._rope = rope
        self._expected = expected
        self._heads = heads
        self._block_size = block_size
        self._dtype = dtype
        # Slots of the group, its rotated tail, and where that lies in the prompt.
        self._tails: OrderedDict[str, tuple[int, Tensor, Tensor]] = OrderedDict()
        self._memory_heads: OrderedDict[str, MemoryHeads | None] = OrderedDict()
        self.stats = LoadStats()

    def load(self, wanted: SlotRange, layers: list[CacheLayer], device: torch.device) -> None:
        """Writes the range into the blocks. Raises `LoadFailed`, or whatever Ray raises for bytes that are gone."""
        began = time.perf_counter()
        blocks = torch.tensor(wanted.blocks)
        for rotated, slots in self._rotate_range(wanted, layers, device):
            mapping = (blocks[slots // self._block_size] * self._block_size + slots % self._block_size).to(device)
            for layer in layers:
                layer.write(rotated[0, layer.index], rotated[1, layer.index], mapping)
        self.stats.seconds += time.perf_counter() - began

    def memory_heads(self, group: str, slots: int, device: torch.device) -> MemoryHeads | None:
        """Where the pairs of each head lie, in a group that was loaded; none where all heads have as many.

        Raises as `load` where that is to be fetched again.
        """
        if group not in self._memory_heads:
            self._note_heads(group, self._fetch_checked(SlotRange(group, slots, 0, slots, ())), device)
        self._memory_heads.move_to_end(group)
        return self._memory_heads[group]

    def knows_heads(self, group: str) -> bool:
        """Whether `memory_heads` need fetch nothing."""
        return group in self._memory_heads

    def _note_heads(self, group: str, memory: "KeptMemory", device: torch.device) -> None:
        if group not in self._memory_heads:
            pools = [self._own_counts(counts) for _, counts in memory.pools]
            self._memory_heads[group] = MemoryHeads.of(pools, self._block_size, device) if pools else None
            while len(self._memory_heads) > _KNOWN_GROUPS:
                self._memory_heads.popitem(last=False)

    def _rotate_range(
        self, wanted: SlotRange, layers: list[CacheLayer], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The range in pieces `[2, layers, slots, heads, head_dim]`, keys rotated, in the cache's dtype; and the slots
        of the prompt that each is for."""
        tail_start = wanted.slots - wanted.slots % self._block_size
        kept = self._tails.get(wanted.group)
        if wanted.start >= tail_start and kept is not None and kept[0] == wanted.slots:
            self._tails.move_to_end(wanted.group)
            self.stats.tail_hits += 1
            _, rotated, slots = kept
            here = (slots >= wanted.start) & (slots < wanted.end)
            yield rotated[:, :, here.to(device)], slots[here]
            return
        memory = self._fetch_checked(wanted)
        if memory.pools and not all(layer.by_head for layer in layers):
            raise LoadFailed(
                "the heads of a layer share its slots, which the engine's attention cannot read: set "
                "memory.memorize.head_budgets to false, and memorize it again"
            )
        self._note_heads(wanted.group, memory, device)
        self.stats.fetched += 1
        order = torch.from_numpy(
            slot_order(memory.total_slots, [(first, pool_slots(counts)) for first, counts in memory.pools])
        )
        tail: list[tuple[Tensor, Tensor]] = []
        first = 0
        for reference, count in zip(memory.chunks, memory.slots, strict=True):
            slots = order[first : first + count]
            here = ((slots >= wanted.start) & (slots < wanted.end)).nonzero()[:, 0]
            if len(here):
                piece = self._rotate(ray.get(reference), memory.shape, count, here, first, device)
                last = slots[here] >= tail_start
                if last.any():
                    tail.append((piece[:, :, last.to(device)], slots[here][last]))
                yield piece, slots[here]
            first += count
        if tail and wanted.end == wanted.slots:
            pieces, places = zip(*tail, strict=True)
            self._tails[wanted.group] = wanted.slots, torch.cat(pieces, dim=2), torch.cat(places)
            while len(self._tails) > _TAILS:
                self._tails.popitem(last=False)

    def _rotate(
        self, raw: Any, shape: MemoryShape, count: int, cut: Tensor, position: int, device: torch.device
    ) -> Tensor:
        """Slots `cut` of one chunk, of which the first slot stands at `position`."""
        full = (2, shape.layers, count, shape.kv_heads, shape.head_dim)
        if raw.shape != full:
            raise LoadFailed(f"a chunk has the shape {raw.shape} instead of {full}")
        piece = as_torch(raw, shape.dtype)[:, :, :, self._heads]
        piece = (piece if len(cut) == count else piece[:, :, cut]).to(device)
        positions = (position + cut).to(device)
        keys = piece[0] if piece.dtype == self._dtype else piece[0].float()
        rotated = torch.empty(piece.shape, dtype=self._dtype, device=device)
        rotated[0] = self._rope.rotate_layers(keys.transpose(1, 2), positions).transpose(1, 2)
        rotated[1] = piece[1]
        self.stats.rotated_slots += piece.shape[2]
        return rotated

    def _fetch_checked(self, wanted: SlotRange) -> "KeptMemory":
        memory = self._fetch(SegmentGroup.parse(wanted.group, wanted.slots))
        expected, shape = self._expected, memory.shape
        if memory.total_slots != wanted.slots:
            raise LoadFailed(f"the request counts {wanted.slots} slots, but the memory has {memory.total_slots}")
        if (shape.layers, shape.kv_heads, shape.head_dim) != expected[:3]:
            raise LoadFailed(
                f"the memory has {shape.layers} layers, {shape.kv_heads} heads and {shape.head_dim} dimensions a head, "
                f"but the engine {expected.layers}, {expected.kv_heads} and {expected.head_dim}"
            )
        model = expected.fingerprint
        if model is not None and memory.fingerprint not in {fingerprint_of(kind, model) for kind in KINDS}:
            raise LoadFailed(
                f"the memory was encoded by the model {memory.fingerprint[:12]}, but the engine runs "
                f"{model[:12]}; memorize it again"
            )
        for _, counts in memory.pools:
            self._own_counts(counts)
        return memory

    def _own_counts(self, counts: Counts) -> Counts:
        """Those of this rank's heads, which must be whole groups. Raises `LoadFailed`."""
        together = counts.shape[2]
        first, end, _ = self._heads.indices(self._expected.kv_heads)
        if first % together or end % together or POOL_BLOCK % self._block_size:
            raise LoadFailed(
                f"{together} heads share slots in blocks of {POOL_BLOCK}, but this rank of the engine has heads "
                f"{first} to {end}, and blocks of {self._block_size}: memorize it again with the engine as it is now"
            )
        return counts[:, first // together : end // together]


def heads_of_rank(kv_heads: int, ranks: int, rank: int) -> slice:
    """Which of the model's KV heads a tensor-parallel rank holds: a share of them, or a copy of one."""
    if kv_heads % ranks == 0:
        share = kv_heads // ranks
        return slice(rank * share, (rank + 1) * share)
    if ranks % kv_heads == 0:
        head = rank * kv_heads // ranks
        return slice(head, head + 1)
    raise ValueError(
        f"{kv_heads} KV heads cannot be shared by {ranks} tensor-parallel ranks; choose a divisor or multiple"
    )


class KeeperClient:
    """Asks the keeper of this process's node, from a process that Ray did not start (vLLM's worker)."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings`: `ray_address`, `namespace`, `storage_root`, `keeper_budget_bytes`, `keeper_timeout_s`."""
        self._settings = settings
        if not ray.is_initialized():
            main = threading.current_thread() is threading.main_thread()
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(settings["ray_address"], log_to_driver=False, configure_logging=False)
            if main:  # vLLM's own handler must stay, or its processes end without cleaning up
                signal.signal(signal.SIGTERM, handler)

    def fetch(self, group: SegmentGroup) -> "KeptMemory":
        """Waits for no longer than `keeper_timeout_s`: the engine stands still meanwhile."""
        from memory_worker.keeper.keeper import local_keeper

        settings = self._settings
        keeper = local_keeper(settings["storage_root"], settings["keeper_budget_bytes"], settings["namespace"])
        memory: KeptMemory = ray.get(keeper.chunks.remote(group), timeout=settings["keeper_timeout_s"])
        return memory
