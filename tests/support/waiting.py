"""Waiting for what happens elsewhere, as long as it takes: a machine may be slow, and only what stands still fails."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

# How long nothing may move. Not a measure of speed: what a quiet machine does in ten seconds may take minutes beside
# other work, and a test that waits longer than this waits for something that will not come.
PATIENCE_S = 600.0
_TICK_S = 0.05

T = TypeVar("T")


def wait_until(condition: Callable[[], T], progress: Callable[[], object] = lambda: None) -> T:
    """What `condition` returns as soon as that is true.

    Gives up when for `PATIENCE_S` it has not been true and what `progress` returns has not changed.
    """
    watch = _Watch()
    while not (found := condition()):
        watch.look(progress())
        time.sleep(_TICK_S)  # for processes that tell nobody
    return found


async def until(condition: Callable[[], Awaitable[T]], progress: Callable[[], object] = lambda: None) -> T:
    """As `wait_until`, for a condition that is awaited."""
    watch = _Watch()
    while not (found := await condition()):
        watch.look(progress())
        await asyncio.sleep(_TICK_S)
    return found


class _Watch:
    def __init__(self) -> None:
        self._seen: object = None
        self._moved = time.monotonic()

    def look(self, seen: object) -> None:
        if seen != self._seen:
            self._seen, self._moved = seen, time.monotonic()
        still_s = time.monotonic() - self._moved
        assert still_s < PATIENCE_S, f"nothing has moved for {still_s:.0f} s; last seen: {seen}"
