"""vLLM engines on a pool, through `ray.serve.llm`: used by the Recaller and the Generator.

`EngineServer` adds to Ray's `LLMServer` one method that takes token ids and streams text: the OpenAI routes
would parse tens of thousands of placeholder ids as JSON and render every token as an event of its own.
"""

import uuid
from collections.abc import AsyncIterator
from typing import Any

from ray.serve import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer

from cluster.config import EngineConfig
from cluster.messages import Finished, TextDelta
from cluster.pools import PoolConfig


class EngineFailed(Exception):
    """The engine ended a request with an error; the request may be tried again."""


class EngineServer(LLMServer):
    """An `LLMServer` whose engine is asked with token ids."""

    async def stream(
        self,
        token_ids: list[int],
        *,
        max_tokens: int,
        cache_salt: str | None = None,
        kv_transfer_params: dict[str, Any] | None = None,
        stop: list[str] | None = None,
        temperature: float = 0.0,
    ) -> AsyncIterator[TextDelta | Finished]:
        """Generates after `token_ids`; ends with `Finished`. Closing the iterator aborts the request.

        Raises `EngineFailed` if the engine gives the request up.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop=stop,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        produced, reason = 0, None
        async for output in self.engine._engine_client.generate(prompt, params, request_id=uuid.uuid4().hex):
            completion = output.outputs[0]
            produced += len(completion.token_ids)
            reason = completion.finish_reason
            if completion.text:
                yield TextDelta(completion.text)
        if reason not in ("stop", "length"):
            raise EngineFailed(f"the engine ended a request with {reason!r}")
        yield Finished(len(token_ids), produced, reason)

    @property
    def tokenizer(self) -> Any:
        """The engine's own Hugging Face tokenizer."""
        return self.engine._engine_client.get_tokenizer()


def engine_application(
    server: type[EngineServer],
    engine: EngineConfig,
    pool: PoolConfig,
    *,
    name: str,
    arguments: dict[str, Any],
    engine_kwargs: dict[str, Any] | None = None,
    env_vars: dict[str, str] | None = None,
) -> Application:
    """A Serve application of one `EngineServer` subclass, named `name`, on `pool`.

    `arguments` go to the subclass's constructor, `engine_kwargs` to vLLM beside those of `engine`.
    """
    on_gpu = pool.gpus_per_replica > 0
    ranks = engine.tensor_parallel_size * engine.pipeline_parallel_size
    bundle = {"GPU": pool.gpus_per_replica} if on_gpu else {"CPU": 1.0}
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": True,
        **(engine_kwargs or {}),
    }
    if engine.block_size is not None:
        kwargs["block_size"] = engine.block_size
    if on_gpu:
        kwargs["gpu_memory_utilization"] = engine.gpu_memory_utilization
    environment = dict(env_vars or {})
    if not on_gpu:
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": engine.cpu_cores,
        }
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": engine.model},
        accelerator_type=pool.accelerator_type,
        accelerator_config=None if on_gpu else {"kind": "cpu"},
        placement_group_config={"bundles": [{**bundle, **pool.resources} for _ in range(ranks)]},
        runtime_env={"env_vars": environment},
        deployment_config={
            **{k: v for k, v in pool.deployment_options().items() if k != "ray_actor_options"},
            "ray_actor_options": {"num_cpus": pool.cpus_per_replica},
        },
        log_engine_metrics=False,
        engine_kwargs=kwargs,
    )
    return build_llm_deployment(
        config, name_prefix="", bind_kwargs=arguments, deployment_cls=server, override_serve_options={"name": name}
    )
