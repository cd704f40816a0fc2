"""A Generator that tells what its engine's prefix cache gave."""

from contextlib import aclosing

from generator_worker.local import Generator


class WatchedGenerator(Generator):
    async def __init__(self, *args, **options) -> None:
        await super().__init__(*args, **options)
        self._cached = 0
        self._generate, self._client.generate = self._client.generate, self._watched

    async def _watched(self, *args):
        async with aclosing(self._generate(*args)) as outputs:
            async for output in outputs:
                self._cached = output.num_cached_tokens
                yield output

    async def cached_tokens(self) -> int:
        """Tokens of the last prompt that came out of the prefix cache."""
        return self._cached
