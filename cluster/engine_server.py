"""The server of one vLLM engine, of which the Recaller and the Generator are made: see `cluster.engine`.

`EngineServer` adds to Ray's `LLMServer` one method that takes token ids and streams text: the OpenAI routes
would parse tens of thousands of placeholder ids as JSON and render every token as an event of its own. Importing
this module imports vLLM (10 s): only replicas do.
"""

import os
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from cluster.engine import core_ids
from cluster.errors import EngineFailed
from cluster.messages import LIKELIEST, EngineStats, Finished, Sampling, TextDelta
from cluster.ray_internals import RunsLeanEngine, lean_engine


class EngineServer(RunsLeanEngine, LLMServer):
    """An `LLMServer` whose engine is asked with token ids.

    A dead engine fails the health check, and Serve replaces the replica.
    """

    async def __init__(self, llm_config: dict[str, Any], *, cores: str | None = None) -> None:  # type: ignore[misc]
        """`llm_config`: fields of an `LLMConfig`, which only replicas import. `cores`: CPU cores the engine's process
        is kept on, such as `0` or `0-3`; none leaves it free.
        """
        self._taken = CacheUse()
        await super().__init__(LLMConfig(**llm_config), engine_cls=lean_engine(partial(_on_cores, cores)))

    async def stream(
        self,
        token_ids: list[int],
        *,
        max_tokens: int,
        cache_salt: str | None = None,
        kv_transfer_params: dict[str, Any] | None = None,
        sampling: Sampling = LIKELIEST,
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
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=max_tokens,
            stop=list(sampling.stop),
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


@contextmanager
def _on_cores(cores: str | None) -> Iterator[None]:
    """Processes started inside stay on `cores`; this thread comes back to where it was."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core_ids(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
