"""The Generator that asks an OpenAI-compatible endpoint; a plain class, run as a Serve deployment."""

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from cluster.messages import EngineStats, Finished, Sampling, TextDelta
from generator_worker.citations import follow_generation
from generator_worker.config import GeneratorConfig
from generator_worker.errors import GenerationFailed
from generator_worker.messages import GenerateRequest, Generation, SourcesRead
from generator_worker.prompts import Prompt, PromptBudget


class RemoteGenerator:
    """Answers from an OpenAI-compatible endpoint, over its chat completions.

    `cache_salt` is not sent: OpenAI's protocol has no such field, and endpoints may refuse what they do not know.
    Whether tenants share a prefix cache is for the endpoint to say; to it they are all one user, with one key.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        from openai import AsyncOpenAI
        from transformers import AutoTokenizer

        assert config.remote is not None
        self._remote = remote = config.remote
        key = os.environ.get(remote.api_key_env) if remote.api_key_env else "none"
        if not key:
            raise ValueError(
                f"generator.remote.api_key_env names {remote.api_key_env}, which is not set where the generator "
                "runs: export it before starting"
            )
        self._client = AsyncOpenAI(base_url=remote.base_url, api_key=key, timeout=remote.timeout_s)
        tokenizer = AutoTokenizer.from_pretrained(remote.tokenizer)
        self._budget = PromptBudget(tokenizer, remote.max_model_len, config.max_answer_tokens)
        self._requests = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[SourcesRead | TextDelta | Generation, None]:
        """Streams which sources were read, the answer, its `Generation`. Closing the iterator hangs up on the endpoint.

        Raises `QuestionTooLong`, or `GenerationFailed` if the endpoint cannot be reached, refuses, or stops.
        """
        prompt = await self._budget.prompt(request)
        self._requests += 1
        try:
            async with aclosing(follow_generation(request, prompt, self._outputs(prompt, request.sampling))) as items:
                async for item in items:
                    yield item
        finally:
            self._requests -= 1

    async def stats(self) -> EngineStats:
        """What this replica is asking the endpoint for."""
        return EngineStats(requests=self._requests, working=self._requests > 0, alive=True)

    async def _outputs(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[TextDelta | Finished, None]:
        import httpx
        import openai

        where = f"{self._remote.base_url} (model {self._remote.model!r})"
        reason: str | None = None
        prompt_tokens, completion_tokens = len(prompt.token_ids), 0
        try:
            stream: Any = await self._client.chat.completions.create(
                model=self._remote.model,
                messages=list(prompt.messages),
                max_tokens=prompt.max_tokens,
                temperature=sampling.temperature,
                top_p=openai.omit if sampling.top_p == 1.0 else sampling.top_p,
                seed=openai.omit if sampling.seed is None else sampling.seed,
                stop=[*prompt.stop, *sampling.stop] or openai.omit,
                stream=True,
                stream_options={"include_usage": True},
            )
            async with stream:
                async for chunk in stream:
                    if chunk.usage is not None:
                        prompt_tokens, completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
                    for choice in chunk.choices:
                        reason = choice.finish_reason or reason
                        if choice.delta.content:
                            yield TextDelta(choice.delta.content)
        except openai.APITimeoutError as error:
            raise GenerationFailed(f"{where} sent nothing for {self._remote.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            raise GenerationFailed(f"{where} cannot be reached: {error.__cause__ or error}") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            named = self._remote.api_key_env or "none: set generator.remote.api_key_env"
            raise GenerationFailed(f"{where} refuses the key (environment variable {named}): {error}") from error
        except openai.APIError as error:
            raise GenerationFailed(f"{where} answered with an error: {error}") from error
        except httpx.TimeoutException as error:
            raise GenerationFailed(f"{where} sent nothing for {self._remote.timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise GenerationFailed(f"{where} broke off in the middle of an answer: {error!r}") from error
        if reason is None:
            raise GenerationFailed(f"{where} broke off in the middle of an answer")
        yield Finished(prompt_tokens, completion_tokens, reason)
