"""The Serve application of the Recaller, for those who deploy it: importing it imports no vLLM."""

from typing import Any

from ray.serve import Application

from cluster.engine import engine_application
from cluster.pools.pools import PoolConfig
from cluster.routing import route_by_memory
from memory_worker.config import MemoryConfig
from memory_worker.head_pools import POOL_BLOCK


def recaller_application(
    config: MemoryConfig, pool: PoolConfig, *, storage_root: str, namespace: str, secret: bytes, name: str = "Recaller"
) -> Application:
    """The Serve application of the Recaller. `config.engine.model` is the memory model's folder or hub name."""
    arguments: dict[str, Any] = {
        "config": config,
        "storage_root": storage_root,
        "namespace": namespace,
        "secret": secret,
    }
    # vLLM's own choice on the CPU is 128, larger than the blocks that heads share.
    blocks = {"block_size": POOL_BLOCK} if config.memorize.head_budgets and not pool.gpus_per_replica else {}
    return engine_application(
        "memory_worker.recall.recaller.Recaller",
        config.engine,
        pool,
        name=name,
        arguments=arguments,
        engine_kwargs=recall_engine_kwargs() | blocks,
        options=route_by_memory(),
    )


def recall_engine_kwargs(connector: dict[str, Any] | None = None) -> dict[str, Any]:
    """What vLLM takes beside the engine's own settings to read memories; `connector` is its extra config."""
    return {
        "kv_transfer_config": {
            "kv_connector": "MemoryConnector",
            "kv_connector_module_path": "memory_worker.recall.connector",
            "kv_role": "kv_consumer",
            "kv_load_failure_policy": "fail",  # to recompute would read the placeholders and keep the garbage cached
            "kv_connector_extra_config": connector or {},
        },
        "worker_extension_cls": "memory_worker.recall.connector.RecallWorker",
    }
