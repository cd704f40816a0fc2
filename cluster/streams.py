"""Streams read as one, or begun again: clues of several kinds and groups, and what a worker that dies did not begin."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

from tenacity import AsyncRetrying

Item = TypeVar("Item")


async def merge_streams(streams: Iterable[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """The items of all streams, each when it comes. Raises the first error of any of them.

    When that happens, or this is closed, all of them are cancelled and have ended before it returns.
    """
    arrived: asyncio.Queue[tuple[Item] | asyncio.Task[None]] = asyncio.Queue()

    async def read(stream: AsyncGenerator[Item, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                arrived.put_nowait((item,))

    reading = {asyncio.create_task(read(stream)) for stream in streams}
    left = len(reading)
    for task in reading:
        task.add_done_callback(arrived.put_nowait)
    try:
        while left:
            item = await arrived.get()
            if isinstance(item, asyncio.Task):
                item.result()
                left -= 1
            else:
                yield item[0]
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def retry_stream(
    begin: Callable[[], AsyncGenerator[Item, None]], retrying: AsyncRetrying
) -> AsyncGenerator[Item, None]:
    """The items of the stream that `begin` makes: again, as `retrying` says, if it fails before its first."""

    async def first() -> tuple[AsyncGenerator[Item, None], list[Item]]:
        stream = begin()
        try:
            return stream, [await anext(stream)]
        except StopAsyncIteration:
            return stream, []

    made: tuple[AsyncGenerator[Item, None], list[Item]] = await retrying(first)
    stream, begun = made
    async with aclosing(stream):
        for item in begun:
            yield item
        async for item in stream:
            yield item
