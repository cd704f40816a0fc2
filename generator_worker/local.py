"""The Generator whose vLLM engine is our own. Importing this module imports vLLM (10 s)."""

import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from cluster.engine_server import EngineServer
from cluster.errors import EngineFailed
from cluster.messages import Finished, TextDelta
from generator_worker.citations import finish_generation
from generator_worker.config import GeneratorConfig
from generator_worker.errors import GenerationFailed
from generator_worker.messages import GenerateRequest, Generation
from generator_worker.prompts import PromptBudget


class Generator(EngineServer):
    """Answers from a vLLM engine of our own."""

    async def __init__(self, llm_config: Any, config: GeneratorConfig, *, cores: str | None = None) -> None:  # type: ignore[misc]
        await super().__init__(llm_config, cores=cores)
        assert config.engine is not None
        room = config.engine.max_model_len
        self._budget = PromptBudget(copy.deepcopy(self.tokenizer), room, config.max_answer_tokens)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TextDelta | Generation, None]:
        """Streams the answer, then its `Generation`. Closing the iterator aborts it in the engine.

        Only requests with the same `cache_salt` share what the engine's prefix cache holds.
        Raises `QuestionTooLong`, or `GenerationFailed` if the engine gives the request up.
        """
        prompt = await self._budget.prompt(request)
        pieces: list[str] = []
        interval = 1 if request.stream else prompt.max_tokens
        outputs = self.stream(
            prompt.token_ids,
            max_tokens=prompt.max_tokens,
            cache_salt=request.cache_salt,
            stop=prompt.stop,
            stream_interval=interval,
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if isinstance(output, Finished):
                        yield finish_generation(pieces, prompt, output)
                    else:
                        pieces.append(output.text)
                        if request.stream:
                            yield output
        except EngineFailed as error:
            raise GenerationFailed(f"the generator gave no answer: {error}") from error
