"""The Generator whose vLLM engine is our own. Importing this module imports vLLM (10 s)."""

import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from cluster.engine_server import EngineServer
from cluster.errors import EngineFailed
from cluster.messages import TextDelta
from generator_worker.citations import follow_generation
from generator_worker.config import GeneratorConfig
from generator_worker.errors import GenerationFailed
from generator_worker.messages import GenerateRequest, Generation, SourcesRead
from generator_worker.prompts import PromptBudget


class Generator(EngineServer):
    """Answers from a vLLM engine of our own."""

    async def __init__(self, llm_config: Any, config: GeneratorConfig, *, cores: str | None = None) -> None:  # type: ignore[misc]
        await super().__init__(llm_config, cores=cores)
        assert config.engine is not None
        room = config.engine.max_model_len
        self._budget = PromptBudget(copy.deepcopy(self.tokenizer), room, config.max_answer_tokens)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[SourcesRead | TextDelta | Generation, None]:
        """Streams which sources were read, the answer, its `Generation`. Closing the iterator aborts it in the engine.

        Only requests with the same `cache_salt` share what the engine's prefix cache holds.
        Raises `QuestionTooLong`, or `GenerationFailed` if the engine gives the request up.
        """
        prompt = await self._budget.prompt(request)
        interval = 1 if request.stream else prompt.max_tokens
        outputs = self.stream(
            prompt.token_ids,
            max_tokens=prompt.max_tokens,
            cache_salt=request.cache_salt,
            sampling=replace(request.sampling, stop=(*prompt.stop, *request.sampling.stop)),
            stream_interval=interval,
        )
        try:
            async with aclosing(follow_generation(request, prompt, outputs)) as items:
                async for item in items:
                    yield item
        except EngineFailed as error:
            raise GenerationFailed(f"the generator gave no answer: {error}") from error
