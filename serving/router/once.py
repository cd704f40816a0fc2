"""Questions with a key: what makes it safe to ask again after the asker was killed. The `Router` is such a class."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import cached_property
from typing import Any

from serving import api

_KEPT_S = 600.0  # how long an answer waits for an asker that comes back
_KEPT = 2048  # answers at most, the oldest go first; also how many runs are counted
_Key = tuple[str, str]  # run, question


class KeyedAnswers:
    """Adds to a class with `answer` what batch runs ask: the same key twice begins to answer once.

    An answer that was begun is brought to its end even where nobody waits for it any more, and kept for ten minutes:
    a run whose process was killed collects it. Failures are not kept: the same key then begins anew.
    """

    answer: Callable[[str, Sequence[str], str | None, api.Question], Coroutine[Any, Any, api.Answer]]

    @cached_property
    def _once(self) -> "_Once":
        return _Once()

    async def answer_once(
        self, run: str, key: str, tenant: str, memories: Sequence[str], question: api.Question
    ) -> api.Answer:
        """As `answer`; with a `key` of this `run` that was seen before, the answer that was begun then."""
        return await self._once.of((run, key), lambda: self.answer(tenant, memories, None, question))

    async def kept_answers(self, run: str) -> list[tuple[str, api.Answer]]:
        """The answers of a run that this replica has or is at: keys and answers. Waits for those that it is at."""
        return await self._once.wait_kept(run)

    def begun(self, run: str) -> int:
        """How many questions of the run this replica began to answer."""
        return self._once.begun.get(run, 0)


class _Once:
    def __init__(self) -> None:
        self._tasks: dict[_Key, asyncio.Task[api.Answer]] = {}  # the oldest first
        self.begun: dict[str, int] = {}  # by run

    async def of(self, key: _Key, begin: Callable[[], Coroutine[Any, Any, api.Answer]]) -> api.Answer:
        task = self._tasks.get(key)
        if task is None:
            self._make_room()
            self.begun[key[0]] = self.begun.pop(key[0], 0) + 1  # popped: runs are kept in the order of their last
            task = self._tasks[key] = asyncio.create_task(begin())
            task.add_done_callback(lambda done: self._settle(key, done))
        return await asyncio.shield(task)

    async def wait_kept(self, run: str) -> list[tuple[str, api.Answer]]:
        tasks = {key: task for key, task in self._tasks.items() if key[0] == run}
        if tasks:
            await asyncio.wait(tasks.values())
        return [(key[1], task.result()) for key, task in tasks.items() if not _has_failed(task)]

    def _settle(self, key: _Key, task: asyncio.Task[api.Answer]) -> None:
        if _has_failed(task):
            self._drop(key, task)
        else:
            asyncio.get_running_loop().call_later(_KEPT_S, self._drop, key, task)

    def _drop(self, key: _Key, task: asyncio.Task[api.Answer]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]

    def _make_room(self) -> None:
        while len(self._tasks) >= _KEPT and self._tasks[oldest := next(iter(self._tasks))].done():
            del self._tasks[oldest]
        if len(self.begun) >= _KEPT:
            del self.begun[next(iter(self.begun))]


def _has_failed(task: asyncio.Task[api.Answer]) -> bool:
    return task.cancelled() or task.exception() is not None
