"""From the object store into paged KV blocks: what the vLLM connector does in each worker process.

A group's slots are fetched from the node's MemoryKeeper, their keys rotated to their slots, this rank's heads cut
out, and written with the attention backend's own cache writer (its layout is its secret).
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
from memory_worker.manifest import MemoryShape
from memory_worker.messages import SegmentGroup
from memory_worker.models.beacon.rope import Rope
from memory_worker.models.fingerprint import KINDS, fingerprint_of
from memory_worker.storage.segments import as_torch

if TYPE_CHECKING:
    from memory_worker.keeper.keeper import KeptMemory

_TAILS = 64  # groups whose last, partial block stays rotated: each question to them writes it again


class LoadFailed(MessageError):
    """A group of segments cannot be put into the cache; the message says why."""


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots `start` to `end` of a group that has `slots` in all, and the cache blocks of its slot 0 onwards."""

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
    """One attention layer of this worker: its index in the whole model, and its cache writer."""

    index: int
    write: Callable[[Tensor, Tensor, Tensor], None]  # keys, values [slots, heads, head_dim], slot mapping [slots] int64


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
        self._tails: OrderedDict[str, tuple[int, Tensor]] = OrderedDict()  # slots of the group, its rotated tail
        self.stats = LoadStats()

    def load(self, wanted: SlotRange, layers: list[CacheLayer], device: torch.device) -> None:
        """Writes the range into the blocks. Raises `LoadFailed`, or whatever Ray raises for bytes that are gone."""
        began = time.perf_counter()
        positions = torch.arange(wanted.start, wanted.end)
        block = torch.tensor(wanted.blocks)[positions // self._block_size]
        mapping = (block * self._block_size + positions % self._block_size).to(device)
        done = 0
        for rotated in self._rotate_range(wanted, device):
            part = mapping[done : done + rotated.shape[2]]
            for layer in layers:
                layer.write(rotated[0, layer.index], rotated[1, layer.index], part)
            done += rotated.shape[2]
        self.stats.seconds += time.perf_counter() - began

    def _rotate_range(self, wanted: SlotRange, device: torch.device) -> Iterator[Tensor]:
        """The range in pieces `[2, layers, slots, heads, head_dim]`, keys rotated, in the cache's dtype."""
        tail_start = wanted.slots - wanted.slots % self._block_size
        kept = self._tails.get(wanted.group)
        if wanted.start >= tail_start and kept is not None and kept[0] == wanted.slots:
            self._tails.move_to_end(wanted.group)
            self.stats.tail_hits += 1
            yield kept[1][:, :, wanted.start - tail_start : wanted.end - tail_start]
            return
        memory = self._fetch_checked(wanted)
        self.stats.fetched += 1
        tail: list[Tensor] = []
        first = 0
        for reference, count in zip(memory.chunks, memory.slots, strict=True):
            low, high = max(wanted.start, first), min(wanted.end, first + count)
            if low < high:
                piece = self._rotate(
                    ray.get(reference), memory.shape, count, slice(low - first, high - first), low, device
                )
                if high > tail_start:
                    tail.append(piece[:, :, max(0, tail_start - low) :].clone())
                yield piece
            first += count
        if tail and wanted.end == wanted.slots:
            self._tails[wanted.group] = wanted.slots, torch.cat(tail, dim=2)
            while len(self._tails) > _TAILS:
                self._tails.popitem(last=False)

    def _rotate(
        self, raw: Any, shape: MemoryShape, count: int, cut: slice, position: int, device: torch.device
    ) -> Tensor:
        """Slots `cut` of one chunk, of which the first stands at `position`."""
        full = (2, shape.layers, count, shape.kv_heads, shape.head_dim)
        if raw.shape != full:
            raise LoadFailed(f"a chunk has the shape {raw.shape} instead of {full}")
        piece = as_torch(raw, shape.dtype)[:, :, cut, self._heads].to(device)
        positions = torch.arange(position, position + piece.shape[2], device=device)
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
        return memory


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
