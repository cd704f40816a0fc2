"""A least-recently-used cache whose values are made once, however many callers want them at the same time."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class SharedCache(Generic[Value]):
    """Values of at most `capacity` in all; each weighs what `weigh` says, or 1.

    A value that could not be made is not kept, so that the next caller tries again. One that is heavier than the
    capacity is given to those who wait for it and not kept; with `keep_one`, it is kept alone until another is made.
    With a capacity of 0 nothing is kept: calls at the same time share one making, and that is all. Values go
    `seconds` after they were made, where that is given.
    """

    def __init__(
        self,
        capacity: int,
        weigh: Callable[[Value], int] | None = None,
        *,
        keep_one: bool = False,
        seconds: float | None = None,
    ) -> None:
        self._seconds = seconds
        self._capacity = capacity
        self._weigh = weigh
        self._keep_one = keep_one
        self._tasks: OrderedDict[Hashable, asyncio.Future[Value]] = OrderedDict()
        self._weights: dict[Hashable, int] = {}  # of the values that are made
        self._total = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    async def get(self, key: Hashable, make: Callable[[], Awaitable[Value]]) -> Value:
        """The value of `key`, made by `make` if it is not there. A cancelled caller does not cancel the making."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.ensure_future(make())
            task.add_done_callback(lambda done: self._settle(key, done))
        self._tasks.move_to_end(key)
        return await asyncio.shield(task)

    def tasks(self) -> dict[Hashable, "asyncio.Future[Value]"]:
        """What is kept and what is being made, by key."""
        return dict(self._tasks)

    def _settle(self, key: Hashable, task: "asyncio.Future[Value]") -> None:
        if task.cancelled() or task.exception() is not None:
            del self._tasks[key]
            return
        weight = 1 if self._weigh is None else self._weigh(task.result())
        if weight > self._capacity and not self._keep_one:
            del self._tasks[key]
            return
        self._weights[key] = weight
        self._total += weight
        if self._seconds is not None:
            asyncio.get_running_loop().call_later(self._seconds, self._expire, key, task)
        while self._total > self._capacity and len(self._weights) > 1:
            # What is still being made weighs nothing yet, and stays: others would make it a second time.
            self._drop(next(each for each in self._tasks if each in self._weights))

    def _expire(self, key: Hashable, task: "asyncio.Future[Value]") -> None:
        if self._tasks.get(key) is task:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        self._total -= self._weights.pop(key)
        del self._tasks[key]
