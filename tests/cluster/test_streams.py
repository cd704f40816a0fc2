"""Several streams are read as one, and none outlives it; one that fails before it begins is begun again."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from cluster.streams import merge_streams, retry_stream


class Streams:
    """Streams that give an item each time they are told to."""

    def __init__(self) -> None:
        self.turns: defaultdict[str, asyncio.Queue[object]] = defaultdict(asyncio.Queue)
        self.ended: list[str] = []

    async def stream(self, name: str) -> AsyncGenerator[object, None]:
        try:
            while (item := await self.turns[name].get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.ended.append(name)


@pytest.fixture
async def streams():
    return Streams()


async def begin(streams: Streams, *names: str) -> AsyncGenerator[object, None]:
    merged = merge_streams([streams.stream(name) for name in names])
    streams.turns[names[-1]].put_nowait("begun")
    assert await anext(merged) == "begun"
    return merged


async def test_items_come_as_they_arrive_until_all_streams_have_ended(streams):
    async with aclosing(await begin(streams, "a", "b")) as merged:
        for name, item in (("b", 1), ("a", 2), ("b", None), ("a", ())):  # an item may be empty
            streams.turns[name].put_nowait(item)
            if item is not None:
                assert await anext(merged) == item
        streams.turns["a"].put_nowait(None)
        with pytest.raises(StopAsyncIteration):
            await anext(merged)
    assert sorted(streams.ended) == ["a", "b"]


async def test_the_first_error_is_raised_and_ends_the_others(streams):
    merged = await begin(streams, "a", "b")
    streams.turns["b"].put_nowait(KeyError("b failed"))
    with pytest.raises(KeyError, match="b failed"):
        await anext(merged)
    assert sorted(streams.ended) == ["a", "b"]


async def test_closing_it_ends_them_all(streams):
    merged = await begin(streams, "a", "b", "c")
    await merged.aclose()
    assert sorted(streams.ended) == ["a", "b", "c"]


async def test_of_no_streams_nothing_comes():
    assert [item async for item in merge_streams([])] == []


class Flaky:
    """A stream that fails at its first beginnings, or later."""

    def __init__(self, *, failures: int, after: int) -> None:
        self.failures, self.after, self.begun, self.closed = failures, after, 0, 0

    async def stream(self) -> AsyncGenerator[int, None]:
        self.begun += 1
        try:
            for item in range(3):
                if self.begun <= self.failures and item == self.after:
                    raise OSError(f"failed at {item}")
                yield item
        finally:
            self.closed += 1


def retrying(attempts: int) -> AsyncRetrying:
    return AsyncRetrying(retry=retry_if_exception_type(OSError), stop=stop_after_attempt(attempts), reraise=True)


async def test_a_stream_that_fails_before_its_first_item_is_begun_again():
    flaky = Flaky(failures=2, after=0)
    assert [item async for item in retry_stream(flaky.stream, retrying(3))] == [0, 1, 2]
    assert flaky.begun == flaky.closed == 3


async def test_a_stream_that_fails_later_or_too_often_is_not():
    for flaky in (Flaky(failures=1, after=1), Flaky(failures=9, after=0)):
        with pytest.raises(OSError, match=f"failed at {flaky.after}"):
            [item async for item in retry_stream(flaky.stream, retrying(2))]
        assert flaky.begun == flaky.closed == (1 if flaky.after else 2)


async def test_closing_it_closes_the_stream():
    flaky = Flaky(failures=0, after=0)
    async with aclosing(retry_stream(flaky.stream, retrying(1))) as items:
        assert await anext(items) == 0
    assert flaky.closed == 1
