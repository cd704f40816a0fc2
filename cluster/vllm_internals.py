"""All that is used of vLLM beneath its top level: for the engine's server, the recall connector and the vLLM plugin.

Nowhere else is a module inside vLLM imported, and `tests/cluster/test_internals.py` fails by name for each name that
another version of vLLM lacks. Importing this imports vLLM (10 s): callers outside of an engine's processes do it late.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.exceptions import VLLMClientError
from vllm.forward_context import ForwardContext
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.kv_cache_interface import KVCacheConfig
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
    "Request",
    "RequestOutputKind",
    "SchedulerOutput",
    "VLLMClientError",
    "VllmConfig",
    "get_kv_transfer_group",
]

CacheWriter = Callable[[Tensor, Tensor, Tensor], None]  # keys, values [slots, heads, head_dim]; slot mapping [slots]


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


def cache_writers(context: ForwardContext) -> Iterator[tuple[int, CacheWriter]]:
    """Index in the whole model, and cache writer, of the attention layers that this worker has."""
    for name, layer in context.no_compile_layers.items():
        if getattr(layer, "kv_cache", None) is not None:
            yield extract_layer_index(name), partial(_write, layer)


def decoder_without(word: str, module: str, name: str) -> type:
    """vLLM's decoder class `name` of its model `module`, but it skips the weights whose names contain `word`."""
    stock: Any = getattr(import_module(f"vllm.model_executor.models.{module}"), name)

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = stock.load_weights(self, (each for each in weights if word not in each[0]))
        return loaded

    return type(name, (stock,), {"load_weights": load_weights, "__module__": __name__})


def _write(layer: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    layer.impl.do_kv_cache_update(layer, keys.contiguous(), values.contiguous(), layer.kv_cache, slots)
