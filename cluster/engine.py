"""vLLM engines on a pool, through `ray.serve.llm`: what the Recaller and the Generator are deployed with.

Whoever deploys an engine imports neither vLLM nor Ray's part for it, which takes 10 s: it names the server's class,
and the replica imports that.
"""

import math
from typing import Any

from ray import serve
from ray.serve import Application

from cluster.config import EngineConfig
from cluster.pools.pools import PoolConfig

_QUIET = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",  # a slow machine takes longer than vLLM's 600
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def engine_application(
    server: str,
    engine: EngineConfig,
    pool: PoolConfig,
    *,
    name: str,
    arguments: dict[str, Any],
    engine_kwargs: dict[str, Any] | None = None,
    env_vars: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> Application:
    """A Serve application of one `EngineServer` or subclass, given as `module.Class`, named `name`, on `pool`.

    `arguments` go to the subclass's constructor, `engine_kwargs` to vLLM beside those of `engine`, `options` to Serve
    beside those of the pool. A replica reserves exactly the pool's CPUs and GPUs of one replica, whatever number of
    processes vLLM starts.
    """
    on_gpu = pool.gpus_per_replica > 0
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": True,
        "disable_log_stats": True,  # nobody reads them yet, and they cost every step
        **(engine_kwargs or {}),
    }
    if engine.block_size is not None:
        kwargs["block_size"] = engine.block_size
    if on_gpu:
        kwargs["gpu_memory_utilization"] = engine.gpu_memory_utilization
    pinned = not on_gpu and engine.cpu_cores != "auto"
    serving = pool.deployment_options(levels={"kv_cache_level": pool.scaling.kv_cache_level}) | (options or {})
    bundles = _bundles(engine, pool)
    runtime_env = {"env_vars": {**_QUIET, **_cpu_environment(engine, pool), **(env_vars or {})}}
    llm_config = {
        "model_loading_config": {"model_id": name, "model_source": engine.model},
        "accelerator_type": pool.accelerator_type,
        "accelerator_config": None if on_gpu else {"kind": "cpu"},
        "placement_group_config": {"bundles": bundles},
        "runtime_env": runtime_env,
        "log_engine_metrics": False,
        "engine_kwargs": kwargs,
    }
    # A replica stands in the first bundle, with its own CPUs.
    first = {"GPU": 0.0, **bundles[0], "CPU": bundles[0].get("CPU", 0.0) + pool.cpus_per_replica}
    deployment = serve.deployment(
        _Server,
        name=name,
        **serving
        | {
            "ray_actor_options": {"num_cpus": pool.cpus_per_replica, "runtime_env": runtime_env},
            "placement_group_bundles": [first, *bundles[1:]],
            "placement_group_strategy": "PACK",
            "placement_group_bundle_label_selector": [pool.node_labels] if pool.node_labels else None,
        },
    )
    by_name: Any = server  # replicas look up a class that is given by its name
    return deployment.options(func_or_class=by_name).bind(
        llm_config=llm_config, **arguments, **({"cores": engine.cpu_cores} if pinned else {})
    )


class _Server:
    """Stands for the server's class until it is named."""


def core_ids(cores: str) -> set[int]:
    """`0-2,5` → {0, 1, 2, 5}."""
    found: set[int] = set()
    for part in cores.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _cpu_environment(engine: EngineConfig, pool: PoolConfig) -> dict[str, str]:
    if pool.gpus_per_replica > 0:
        return {}
    pinned = engine.cpu_cores != "auto"
    ranks = engine.ranks
    threads = len(core_ids(engine.cpu_cores)) if pinned and ranks == 1 else math.ceil(pool.cpus_per_replica / ranks)
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": engine.cpu_cores if pinned else "nobind",
        "OMP_NUM_THREADS": str(threads),
    }


def _bundles(engine: EngineConfig, pool: PoolConfig) -> list[dict[str, float]]:
    """What each rank of a replica reserves beside the replica's own CPUs, which the first is given, too."""
    kind = {f"accelerator_type:{pool.accelerator_type}": 0.001} if pool.accelerator_type else {}
    if pool.gpus_per_replica == 0:
        return [{"CPU": 0.0, **kind, **pool.resources}]
    ranks = engine.ranks
    if pool.gpus_per_replica != ranks and (ranks > 1 or pool.gpus_per_replica > 1):
        raise ValueError(
            f"tensor_parallel_size × pipeline_parallel_size is {ranks}, but the pool gives a replica "
            f"{pool.gpus_per_replica:g} GPUs: set gpus_per_replica to {ranks}"
        )
    shared = {name: amount / ranks for name, amount in pool.resources.items()}
    return [{"GPU": pool.gpus_per_replica / ranks, **kind, **shared} for _ in range(ranks)]
