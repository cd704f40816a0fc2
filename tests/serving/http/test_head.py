"""`HEAD` is the beginning of `GET`, and ends what would go on."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from serving.http.head import AnswersHead


def app(ended: list[str]) -> FastAPI:
    made = FastAPI()
    made.add_middleware(AnswersHead)

    @made.get("/thing")
    async def thing(response: Response) -> dict[str, int]:
        response.headers["ETag"] = '"v1"'
        return {"a": 1}

    @made.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"piece"
                    await asyncio.sleep(0)
            finally:
                ended.append("stream")

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @made.get("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    @made.post("/other")
    async def other() -> None:
        """Takes no GET."""

    return made


async def test_the_head_of_get_without_its_body() -> None:
    ended: list[str] = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app(ended)), base_url="http://here") as client:
        got, head = await client.get("/thing"), await client.head("/thing")
        assert head.status_code == 200 and head.headers == got.headers and got.content and not head.content
        head = await client.head("/stream")
        assert head.headers["content-type"].startswith("text/event-stream") and not head.content
        assert ended == ["stream"], "it goes on for nobody"
        assert (await client.head("/nothing")).status_code == 404
        assert (await client.head("/other")).status_code == 405
        with pytest.raises(RuntimeError, match="broken"):
            await client.head("/broken")
