"""Several streams are read as one, and none outlives it."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from cluster.streams import merge_streams


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
