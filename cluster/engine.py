"""vLLM engines on a pool, through `ray.serve.llm`: used by the Recaller and the Generator.

`EngineServer` adds to Ray's `LLMServer` one method that takes token ids and streams text: the OpenAI routes
would parse tens of thousands of placeholder ids as JSON and render every token as an event of its own. Importing
this module imports vLLM (10 s): code that only handles errors or messages takes them from their own modules.
"""

import math
import os
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

from ray.serve import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer

from cluster.config import EngineConfig
from cluster.errors import EngineFailed
from cluster.messages import EngineStats, Finished, TextDelta
from cluster.pools.pools import PoolConfig
from cluster.ray_internals import RunsLeanEngine, lean_engine

_QUIET = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class EngineServer(RunsLeanEngine, LLMServer):
    """An `LLMServer` whose engine is asked with token ids.

    A dead engine fails the health check, and Serve replaces the replica.
    """

    async def __init__(self, llm_config: LLMConfig, *, cores: str | None = None) -> None:  # type: ignore[misc]
        """`cores`: CPU cores the engine's process is kept on, such as `0` or `0-3`; none leaves it free."""
        self._taken = CacheUse()
        await super().__init__(llm_config, engine_cls=lean_engine(partial(_on_cores, cores)))

    async def stream(
        self,
        token_ids: list[int],
        *,
        max_tokens: int,
        cache_salt: str | None = None,
        kv_transfer_params: dict[str, Any] | None = None,
        stop: list[str] | None = None,
        temperature: float = 0.0,
        ignore_eos: bool = False,
        stream_interval: int = 1,
    ) -> AsyncGenerator[TextDelta | Finished, None]:
        """Generates after `token_ids`; ends with `Finished`. Closing the iterator aborts the request.

        Text comes every `stream_interval` tokens: fewer pieces cost less.

        Raises `ValueError` if the request cannot be served as it is (too long, say), `EngineFailed` if the
        engine gives it up.
        """
        from vllm import SamplingParams

        from cluster.vllm_internals import EngineDeadError, EngineGenerateError, RequestOutputKind, VLLMClientError

        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=stream_interval,
            extra_args={"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        produced, reported, reason = 0, 0, None
        shared = (kv_transfer_params or {}).get("num_memory_tokens", 0)
        own = len(token_ids) - shared + max_tokens
        self._taken.take(cache_salt, shared, own)
        try:
            # Closed here and now, not when garbage is collected: closing is what aborts the request.
            async with aclosing(self._client.generate(prompt, params, uuid.uuid4().hex)) as outputs:
                async for output in outputs:
                    completion = output.outputs[0]
                    produced += len(completion.token_ids)
                    reason = completion.finish_reason
                    if completion.text:
                        yield TextDelta(completion.text, produced - reported)
                        reported = produced
        except VLLMClientError as error:
            raise ValueError(str(error)) from None
        except EngineDeadError as error:
            raise EngineFailed("the engine died; its replica is being replaced, try again") from error
        except EngineGenerateError as error:
            raise EngineFailed(f"the engine failed: {error.__cause__!r}") from error
        finally:
            self._taken.give_back(cache_salt, own)
        if reason is None or reason in ("abort", "error"):
            raise EngineFailed(f"the engine ended a request with {reason!r}; try again")
        yield Finished(len(token_ids), produced, reason)

    async def stats(self) -> EngineStats:
        """What the engine is doing now."""
        from cluster.vllm_internals import has_work

        client = self._client
        if client.errored:
            return EngineStats(requests=0, working=False, alive=False)
        return EngineStats(client.get_num_unfinished_requests(), await has_work(client), alive=True)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """`kv_cache_level`: tokens that the requests at work may come to hold, as a share of the KV cache."""
        from cluster.vllm_internals import cache_tokens

        return {"kv_cache_level": self._taken.tokens / cache_tokens(self._client)}

    @property
    def tokenizer(self) -> Any:
        """The engine's own Hugging Face tokenizer; calls are synchronous."""
        return self._client.get_tokenizer()


class CacheUse:
    """Tokens that an engine's requests may come to hold in its KV cache, counted before it computes any of them.

    vLLM's own figure comes with statistics that cost every step, and only once blocks are taken; this one sees a
    request that waits. A prefix that requests share, told apart by its salt, counts once.
    """

    def __init__(self) -> None:
        self._own = 0
        self._readers: Counter[str | None] = Counter()  # requests by their salt
        self._shared: dict[str | None, int] = {}  # tokens of the prefix that they share

    @property
    def tokens(self) -> int:
        return self._own + sum(self._shared.values())

    def take(self, salt: str | None, shared: int, own: int) -> None:
        """A request with so many tokens of a shared prefix, and so many of its own with those that it may write."""
        self._own += own
        self._readers[salt] += 1
        self._shared[salt] = max(shared, self._shared.get(salt, 0))

    def give_back(self, salt: str | None, own: int) -> None:
        """That request has ended."""
        self._own -= own
        self._readers[salt] -= 1
        if not self._readers[salt]:
            del self._readers[salt], self._shared[salt]


def engine_application(
    server: type[EngineServer],
    engine: EngineConfig,
    pool: PoolConfig,
    *,
    name: str,
    arguments: dict[str, Any],
    engine_kwargs: dict[str, Any] | None = None,
    env_vars: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> Application:
    """A Serve application of one `EngineServer` subclass, named `name`, on `pool`.

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
    serving["ray_actor_options"] = {"num_cpus": pool.cpus_per_replica}
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": engine.model},
        accelerator_type=pool.accelerator_type,
        accelerator_config=None if on_gpu else {"kind": "cpu"},
        placement_group_config={"bundles": _bundles(engine, pool)},
        runtime_env={"env_vars": {**_QUIET, **_cpu_environment(engine, pool), **(env_vars or {})}},
        deployment_config=serving,
        log_engine_metrics=False,
        engine_kwargs=kwargs,
    )
    return build_llm_deployment(
        config,
        bind_kwargs={**arguments, **({"cores": engine.cpu_cores} if pinned else {})},
        deployment_cls=server,
        override_serve_options={
            "name": name,
            "placement_group_bundle_label_selector": [pool.node_labels] if pool.node_labels else None,
        },
    )


@contextmanager
def _on_cores(cores: str | None) -> Iterator[None]:
    """Processes started inside stay on `cores`; this thread comes back to where it was."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _core_ids(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _core_ids(cores: str) -> set[int]:
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
    threads = len(_core_ids(engine.cpu_cores)) if pinned and ranks == 1 else math.ceil(pool.cpus_per_replica / ranks)
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": engine.cpu_cores if pinned else "nobind",
        "OMP_NUM_THREADS": str(threads),
    }


def _bundles(engine: EngineConfig, pool: PoolConfig) -> list[dict[str, float]]:
    """What each rank of a replica reserves beside the replica's own CPUs, which Ray adds to the first."""
    if pool.gpus_per_replica == 0:
        return [{"CPU": 0.0, **pool.resources}]
    ranks = engine.ranks
    if pool.gpus_per_replica != ranks and (ranks > 1 or pool.gpus_per_replica > 1):
        raise ValueError(
            f"tensor_parallel_size × pipeline_parallel_size is {ranks}, but the pool gives a replica "
            f"{pool.gpus_per_replica:g} GPUs: set gpus_per_replica to {ranks}"
        )
    shared = {name: amount / ranks for name, amount in pool.resources.items()}
    return [{"GPU": pool.gpus_per_replica / ranks, **shared} for _ in range(ranks)]
