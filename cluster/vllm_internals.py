"""All that is used of vLLM beneath its top level: for the engine's server, the recall connector and the vLLM plugin.

Nowhere else is a module inside vLLM imported, and `tests/cluster/test_internals.py` fails by name for each name that
another version of vLLM lacks. Importing this imports vLLM (10 s): callers outside of an engine's processes do it late.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.exceptions import VLLMClientError
from vllm.forward_context import ForwardContext
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request

__all__ = [
    "EngineDeadError",
    "EngineGenerateError",
    "ForwardContext",
    "KVCacheBlocks",
    "KVCacheConfig",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "ReadsByHead",
    "Request",
    "RequestOutputKind",
    "SchedulerOutput",
    "VLLMClientError",
    "VllmConfig",
    "get_kv_transfer_group",
]

CacheWriter = Callable[[Tensor, Tensor, Tensor], None]  # keys, values [slots, heads, head_dim]; slot mapping [slots]
BY_HEAD = ("CPU_ATTN", "FLASH_ATTN")  # backends that can attend by head


class Sequences(Protocol):
    """A batch by head: what attention takes, in the place of requests, as sequences of one KV head each."""

    @property
    def rows(self) -> Tensor | None:
        """Int64 [tokens * kv_heads]: of which `token * kv_heads + head` each query is; none where as they come."""

    @property
    def starts(self) -> Tensor:
        """Int32 [sequences + 1], of their queries."""

    @property
    def lengths(self) -> Tensor:
        """Int32 [layers, sequences], slots that each sees."""

    @property
    def tables(self) -> Tensor:
        """Int32 [layers, sequences, most], blocks of a cache `[blocks * kv_heads, 1, block, …]`."""

    @property
    def longest(self) -> int:
        """No sequence has more slots."""


class ReadsByHead(ABC):
    """A KV connector that knows of requests whose heads see slots of their own."""

    @abstractmethod
    def head_sequences(
        self, table: Tensor, lengths: Tensor, starts: Tensor, *, block: int, kv_heads: int
    ) -> Sequences | None:
        """Of a batch with these block tables [requests, most], slots [requests] and starts of queries [requests + 1];
        none where no request has such heads. Asked once for each forward pass, after its loads."""


async def has_work(client: Any) -> bool:
    """Whether the scheduler of an `AsyncLLM` has a request."""
    working: bool = await client.engine_core.call_utility_async("has_work")
    return working


def cache_tokens(client: Any) -> int:
    """Tokens that the KV cache of an `AsyncLLM` holds."""
    cache = client.vllm_config.cache_config
    return int(cache.num_gpu_blocks * cache.block_size)


def tensor_parallel_rank(config: VllmConfig) -> int:
    """Of this worker's process."""
    return get_tensor_model_parallel_rank() if config.parallel_config.tensor_parallel_size > 1 else 0


def cache_writers(context: ForwardContext) -> Iterator[tuple[int, CacheWriter, bool]]:
    """Index in the whole model, cache writer, and whether it attends by head, of this worker's attention layers."""
    for name, layer in context.no_compile_layers.items():
        if getattr(layer, "kv_cache", None) is not None:
            yield extract_layer_index(name), partial(_write, layer), getattr(layer.impl, "attends_by_head", False)


def register_attention(classes: str) -> None:
    """Has vLLM take, for each backend of `BY_HEAD`, the class of that name in the module `classes`."""
    for name in BY_HEAD:
        register_backend(AttentionBackendEnum[name], f"{classes}.{name}")


def attention_by_head(name: str) -> Any:
    """vLLM's attention backend `name`, but it attends by head where the engine's KV connector `ReadsByHead`.

    Batches in which no request needs it go through the backend as they are. What depends on a head's number (sinks,
    ALiBi) is not served so: such a layer does not attend by head.
    """
    stock: Any = AttentionBackendEnum[name].value
    module, _, cls = stock.rpartition(".")
    backend: Any = getattr(import_module(module), cls)
    impl: Any = backend.get_impl_cls()
    builder: Any = backend.get_builder_cls()
    sequence_metadata = {"CPU_ATTN": _cpu_metadata, "FLASH_ATTN": _flash_metadata}[name]

    class Impl(impl):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.attends_by_head = self.sinks is None and self.alibi_slopes is None

        @cached_property
        def _of_one_head(self) -> Any:
            one = copy.copy(self)
            one.num_heads, one.num_kv_heads = self.num_heads // self.num_kv_heads, 1
            return one

        def forward(
            self, layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
            *args: Any, **kwargs: Any,
        ) -> Tensor:  # fmt: skip
            heads = _sequences(attn_metadata, kv_cache) if attn_metadata is not None and self.attends_by_head else None
            if heads is None:
                stock_output: Tensor = super().forward(
                    layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
                )
                return stock_output
            blocks, kv_heads, block, _ = kv_cache.shape
            tokens, group = attn_metadata.num_actual_tokens, query.shape[1] // kv_heads
            asked = query[:tokens].reshape(tokens * kv_heads, group, -1)
            asked = asked if heads.rows is None else asked[heads.rows]
            answered = torch.empty_like(asked)
            impl.forward(
                self._of_one_head, layer, asked, key, value, kv_cache.view(blocks * kv_heads, 1, block, -1),
                sequence_metadata(attn_metadata, heads, layer, asked), answered,
            )  # fmt: skip
            places = slice(None) if heads.rows is None else heads.rows
            output[:tokens].view(tokens * kv_heads, group, -1)[places] = answered
            return output

    class Builder(builder):
        @classmethod
        def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
            if _reads_by_head(vllm_config):  # a graph would not ask by which heads a batch is read
                return AttentionCGSupport.NEVER
            support: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return support

    class Backend(backend):
        @staticmethod
        def get_impl_cls() -> type:
            return Impl

        @staticmethod
        def get_builder_cls() -> type:
            return Builder

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            layouts: tuple[KVCacheLayout, ...] = super().supported_kv_cache_layouts()
            config = get_current_vllm_config_or_none()
            # A block of slots of one head must lie together.
            return (KVCacheLayout.LBHNC,) if config and _reads_by_head(config) else layouts

    Backend.__name__ = Backend.__qualname__ = name
    return Backend


def decoder_without(word: str, module: str, name: str) -> type:
    """vLLM's decoder class `name` of its model `module`, but it skips the weights whose names contain `word`."""
    stock: Any = getattr(import_module(f"vllm.model_executor.models.{module}"), name)

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = stock.load_weights(self, (each for each in weights if word not in each[0]))
        return loaded

    return type(name, (stock,), {"load_weights": load_weights, "__module__": __name__})


def _write(layer: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    layer.impl.do_kv_cache_update(layer, keys.contiguous(), values.contiguous(), layer.kv_cache, slots)


def _sequences(metadata: Any, kv_cache: Tensor) -> Sequences | None:
    """The batch by head, where the connector has one; of all layers together, so that it is asked once."""
    if not hasattr(metadata, "head_sequences"):
        connector = get_kv_transfer_group() if has_kv_transfer_group() else None
        metadata.head_sequences = (
            connector.head_sequences(
                metadata.block_table,
                metadata.seq_lens,
                metadata.query_start_loc,
                block=kv_cache.shape[2],
                kv_heads=kv_cache.shape[1],
            )
            if isinstance(connector, ReadsByHead)
            else None
        )
    found: Sequences | None = metadata.head_sequences
    return found


def _reads_by_head(config: VllmConfig) -> bool:
    """Whether the engine's KV connector is one of those that say which heads see which slots."""
    path = config.kv_transfer_config.kv_connector_module_path if config.kv_transfer_config else None
    return path is not None and issubclass(
        getattr(import_module(path), config.kv_transfer_config.kv_connector), ReadsByHead
    )


def _cpu_metadata(metadata: Any, heads: Sequences, layer: Any, asked: Tensor) -> Any:
    """Of the sequences in one layer. `asked` are their queries [rows, heads of one KV head, head_dim]."""
    index = extract_layer_index(layer.layer_name)
    lengths = heads.lengths[index]
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=asked.shape[1],
        num_kv_heads=1,
        head_dim=asked.shape[2],
        seq_lens=lengths,
        dtype=asked.dtype,
        query_start_loc=heads.starts,
        causal=True,
        sliding_window_size=-1,
        isa=layer.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=layer.kv_cache_dtype,
    )
    return replace(
        metadata,
        num_actual_tokens=len(asked),
        query_start_loc=heads.starts,
        seq_lens=lengths,
        max_seq_len=heads.longest,
        block_table=heads.tables[index],
        scheduler_metadata=plan,
    )


def _flash_metadata(metadata: Any, heads: Sequences, layer: Any, asked: Tensor) -> Any:
    """As `_cpu_metadata`; the kernel plans by itself."""
    index = extract_layer_index(layer.layer_name)
    return replace(
        metadata,
        num_actual_tokens=len(asked),
        query_start_loc=heads.starts,
        seq_lens=heads.lengths[index],
        max_seq_len=heads.longest,
        block_table=heads.tables[index],
        use_cascade=False,
        scheduler_metadata=None,
        max_num_splits=0,
    )
