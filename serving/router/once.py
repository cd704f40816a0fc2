"""Questions with a key: what makes it safe to ask again after the asker was killed. The `Router` is such a class."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from functools import cached_property
from typing import Any, cast

from cluster.shared_cache import SharedCache
from serving import api

_KEPT_S = 600.0  # how long an answer waits for an asker that comes back
_KEPT = 2048  # answers at most, those asked for longest ago go first; also how many runs are counted


class KeyedAnswers:
    """Adds to a class with `answer` what batch runs ask: the same key twice begins to answer once.

    An answer that was begun is brought to its end even where nobody waits for it any more, and kept for ten minutes:
    a run whose process was killed collects it. Failures are not kept: the same key then begins anew.
    """

    answer: Callable[[str, Sequence[str], str | None, api.Question], Coroutine[Any, Any, api.Answer]]

    @cached_property
    def _answers(self) -> SharedCache[api.Answer]:
        return SharedCache(_KEPT, seconds=_KEPT_S)

    @cached_property
    def _begun(self) -> OrderedDict[str, int]:
        return OrderedDict()  # by run, the one that began one last is last

    async def answer_once(
        self, run: str, key: str, tenant: str, memories: Sequence[str], question: api.Question
    ) -> api.Answer:
        """As `answer`; with a `key` of this `run` that was seen before, the answer that was begun then."""

        async def begin() -> api.Answer:
            self._begun[run] = self._begun.pop(run, 0) + 1
            if len(self._begun) > _KEPT:
                self._begun.popitem(last=False)
            return await self.answer(tenant, memories, None, question)

        return await self._answers.get((run, key), begin)

    async def kept_answers(self, run: str) -> list[tuple[str, api.Answer]]:
        """The answers of a run that this replica has or is at: keys and answers. Waits for those that it is at."""
        found: list[tuple[str, api.Answer]] = []
        for name, task in self._answers.tasks().items():
            asked, key = cast(tuple[str, str], name)
            if asked == run:
                await asyncio.wait([task])
                if not task.cancelled() and task.exception() is None:
                    found.append((key, task.result()))
        return found

    def begun(self, run: str) -> int:
        """How many questions of the run this replica began to answer."""
        return self._begun.get(run, 0)
