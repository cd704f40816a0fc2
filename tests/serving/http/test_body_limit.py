"""Bodies beyond a limit are 413, whatever the headers claim, and are not read on."""

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel

from serving.http.body_limit import BodyLimit


class Model(BaseModel):
    text: str = ""


def app() -> FastAPI:
    made = FastAPI()
    made.add_middleware(BodyLimit, json_bytes=100, upload_bytes=1000)

    async def size(request: Request) -> int:
        return len(await request.body())

    made.add_api_route("/v1/memories", size, methods=["POST"])
    made.add_api_route("/v1/memories/m/documents/a", size, methods=["PUT"])
    made.add_api_route("/v1/other", size, methods=["POST"])

    @made.post("/v1/model")
    async def model(model: Model) -> int:
        return len(model.text)

    return made


async def send(method: str, path: str, size: int, kinds: list[str], *, declared: bool) -> httpx.Response:
    async def pieces():
        sent = 0
        while sent < size:
            part = min(64, size - sent)
            sent += part
            yield b"x" * part

    headers = [("content-type", kind) for kind in kinds]
    if declared:
        headers.append(("content-length", str(size)))
    transport = httpx.ASGITransport(app(), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, content=pieces(), headers=headers)


JSON, TEXT = ["application/json"], ["text/plain"]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("method", "path", "kinds", "limit"),
    [
        ("POST", "/v1/memories", JSON, 100),
        ("POST", "/v1/memories", ["Application/JSON; charset=utf-8"], 100),
        ("POST", "/v1/memories", [], 100),
        ("POST", "/v1/memories", ["multipart/form-data; boundary=json"], 1000),
        ("POST", "/v1/memories", [*JSON, *TEXT], 100),  # whoever reads the body goes by the first
        ("PUT", "/v1/memories/m/documents/a", TEXT, 1000),
        ("PUT", "/v1/memories/m/documents/a", JSON, 100),
        ("POST", "/v1/other", TEXT, 100),  # holds its body in memory whatever it is called
    ],
)
async def test_the_limit_is_exact(method: str, path: str, kinds: list[str], limit: int, declared: bool) -> None:
    allowed = await send(method, path, limit, kinds, declared=declared)
    assert (allowed.status_code, allowed.json()) == (200, limit)
    refused = await send(method, path, limit + 1, kinds, declared=declared)
    assert refused.status_code == 413
    assert refused.headers["content-type"] == "application/problem+json"
    assert f"larger than {limit:,} bytes" in refused.json()["detail"]


async def test_a_reader_that_hides_the_refusal_does_not() -> None:
    """FastAPI makes 400 of whatever goes wrong while it reads the body of a model."""
    refused = await send("POST", "/v1/model", 200, JSON, declared=False)
    assert refused.status_code == 413 and "larger than 100 bytes" in refused.json()["detail"]


async def test_a_declared_size_that_is_no_number_is_counted() -> None:
    transport = httpx.ASGITransport(app())
    for declared in ("\u0663".encode(), b"9" * 5000, b"-1", b"1e9"):
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.post("/v1/other", content=b"x" * 101, headers={b"content-length": declared})
        assert response.status_code == 413
