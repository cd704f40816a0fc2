"""vLLM KV connector: serves a group of memory segments as the first tokens of a prompt.

The Recaller's engine is configured with it. A request brings as many placeholder ids as the group has slots, a
`cache_salt` (placeholders of two groups look alike to the prefix cache, so without one memory would answer for
another), and `kv_transfer_params` of `{"memory": SegmentGroup.name, "num_memory_tokens": slots}`.

Loading is synchronous: vLLM's prefix cache then shares a group's full blocks with every question that comes in the
same step or later, so a group is loaded once per engine. The slots in its last, partial block belong to each
question's own block and are written once per question, from a copy kept rotated. What could be slow (storage, other
nodes) the Recaller has done before it submits. A load that fails fails its requests only
(`kv_load_failure_policy: fail`), and the blocks leave the prefix cache.

Where the heads of a layer share a memory's slots, attention must be told which are whose: each step says which of its
requests read memories, and by the first block of each, its worker finds the request in the batch (`head_sequences`).
"""

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cluster.vllm_internals import (
    ForwardContext,
    KVCacheBlocks,
    KVCacheConfig,
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    ReadsByHead,
    Request,
    SchedulerOutput,
    VllmConfig,
    cache_writers,
    get_kv_transfer_group,
    tensor_parallel_rank,
)
from memory_worker.messages import SegmentGroup
from memory_worker.models.beacon.rope import Rope
from memory_worker.recall.head_tables import HeadSequences, head_sequences
from memory_worker.recall.loading import CacheLayer, Expected, KeeperClient, MemoryLoader, SlotRange, heads_of_rank

logger = logging.getLogger("vllm.memory_connector")  # vLLM shows only loggers below its own


@dataclass
class MemoryLoads(KVConnectorMetadata):
    """What the workers have to load before the next forward pass, and which blocks must be given up."""

    ranges: list[SlotRange] = field(default_factory=list)
    refused: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # reason, blocks
    read: dict[int, tuple[str, int]] = field(default_factory=dict)  # by a request's first block: its group, and slots


class MemoryConnector(KVConnectorBase_V1, ReadsByHead):
    """Extra config: `fingerprint` (of the memory model; none accepts any) and what `KeeperClient` takes."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._pending = MemoryLoads()
        self._reading: dict[str, tuple[int, tuple[str, int]]] = {}  # by request: its first block, its group and slots
        self._failed: set[int] = set()
        self._layers: list[CacheLayer] = []
        self._block_size: int = vllm_config.cache_config.block_size
        if len(kv_cache_config.kv_cache_groups) > 1:
            raise ValueError(
                f"{vllm_config.model_config.model} keeps the keys and values of its layers in several ways, and a "
                "memory can be put into one of them only: use a model with full attention in all layers"
            )
        if role == KVConnectorRole.WORKER:
            self.loader = _loader(vllm_config, self._block_size)

    # In the scheduler's process.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        memory = _memory_of(request)
        if memory is None:
            return 0, False
        slots = memory.slots if isinstance(memory, SlotRange) else 1  # a refused request must load something to fail
        return max(0, min(slots, request.num_tokens - 1) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        memory = _memory_of(request)
        if memory is None:
            return
        block_ids = tuple(blocks.get_block_ids()[0])
        if isinstance(memory, str):
            self._pending.refused.append((memory, block_ids))
            return
        self._reading[request.request_id] = block_ids[0], (memory.group, memory.slots)
        if num_external_tokens > 0:
            start = memory.slots - num_external_tokens
            self._pending.ranges.append(SlotRange(memory.group, memory.slots, start, memory.slots, block_ids))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> MemoryLoads:
        pending, self._pending = self._pending, MemoryLoads()
        if not scheduler_output.has_sync_kv_loads:  # then vLLM has loads run after the forward pass, too late for these
            pending.refused += [(f"{each.group} would be loaded too late", each.blocks) for each in pending.ranges]
            pending.ranges = []
        pending.read = dict(
            self._reading[request] for request in scheduler_output.num_scheduled_tokens if request in self._reading
        )
        return pending

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._reading.pop(request.request_id, None)
        return False, None

    # In each worker's process.

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, MemoryLoads)
        for reason, blocks in metadata.refused:
            logger.error("refused a request: %s", reason)
            self._failed |= set(blocks)
        for wanted in metadata.ranges:
            if not self._layers:
                self._layers = [CacheLayer(*each) for each in cache_writers(forward_context)]
            first = wanted.start // self._block_size
            blocks = wanted.blocks[first : -(-wanted.end // self._block_size)]
            try:
                self.loader.load(wanted, self._layers, self._device)
            except Exception as error:  # noqa: BLE001  whatever it is, it must fail this load and not the engine
                cause = getattr(error, "cause", error)  # of a task that failed, without its stack
                logger.error("loading the memory %s failed: %s: %s", wanted.group, type(cause).__name__, cause)
                self.loader.stats.failed += 1
                self._failed |= set(blocks)
                if not self.loader.knows_heads(wanted.group):
                    self._failed.add(wanted.blocks[0])
                    metadata.read.pop(wanted.blocks[0], None)

    def head_sequences(
        self, table: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, *, block: int, kv_heads: int
    ) -> HeadSequences | None:
        metadata = self._connector_metadata
        if not isinstance(metadata, MemoryLoads) or not metadata.read:
            return None
        memories = []
        for first in table[: len(starts) - 1, 0].tolist():
            asked = metadata.read.get(first)
            try:
                memories.append(self.loader.memory_heads(*asked, self._device) if asked else None)
            except Exception as error:  # noqa: BLE001  as in start_load_kv: where it cannot be known, its request fails
                logger.error("what the heads of %s keep is not known: %s", asked[0] if asked else "", error)
                self._failed.add(first)
                memories.append(None)
        if not any(memories):
            return None
        return head_sequences(memories, table, lengths, starts, block=block, kv_heads=kv_heads)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._device = next(iter(kv_caches.values())).device

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded in the background."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Memories are made by the Memorizer, not here."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


class RecallWorker:
    """vLLM worker extension: what the Recaller asks its engine's workers with `collective_rpc`."""

    def recall_stats(self) -> dict[str, float]:
        """`memory_worker.recall.loading.LoadStats` as a dict."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, MemoryConnector)
        return asdict(connector.loader.stats)


def _memory_of(request: Request) -> SlotRange | str | None:
    """All slots that a request asks for, the reason why it must be refused, or none if it asks for none."""
    parameters = request.kv_transfer_params or {}
    if "memory" not in parameters and "num_memory_tokens" not in parameters:
        return None
    memory, slots = parameters.get("memory"), parameters.get("num_memory_tokens")
    if not request.cache_salt:
        return "it names a memory but has no cache_salt"
    if not isinstance(memory, str):
        return f"its memory {memory!r} is no text"
    if not isinstance(slots, int) or not 0 < slots < request.num_prompt_tokens:
        return f"its num_memory_tokens {slots!r} is not between 1 and its {request.num_prompt_tokens} prompt tokens"
    try:
        return SlotRange(SegmentGroup.parse(memory, slots).name, slots, 0, slots, ())
    except ValueError as error:
        return str(error)


def _loader(vllm_config: VllmConfig, block_size: int) -> MemoryLoader:
    settings = vllm_config.kv_transfer_config.kv_connector_extra_config
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    expected = Expected(
        model.get_total_num_hidden_layers(),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        settings.get("fingerprint"),
    )
    return MemoryLoader(
        KeeperClient(settings).fetch,
        Rope.from_config(model.hf_text_config.to_dict()),
        expected,
        heads=heads_of_rank(expected.kv_heads, parallel.tensor_parallel_size, tensor_parallel_rank(vllm_config)),
        block_size=block_size,
        dtype=model.dtype,
    )
