"""What the proxy answers of its own when a replica dies can be retried; what the Ingress answers passes unchanged."""

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from serving.http.proxy import RetryableFailures, middlewares


async def answer(app) -> httpx.Response:
    transport = httpx.ASGITransport(RetryableFailures(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get("/")


def check_retryable(response: httpx.Response) -> None:
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == 503 and "try again" in response.json()["detail"]


@pytest.mark.parametrize("status", [404, 408, 429, 500, 503])
async def test_the_proxys_own_failures_can_be_retried(status: int) -> None:
    response = await answer(PlainTextResponse("Internal Server Error: ActorDiedError(secret)", status_code=status))
    check_retryable(response)
    assert "secret" not in response.text


async def test_a_response_that_never_began_can_be_retried() -> None:
    async def nothing(*_: object) -> None: ...

    check_retryable(await answer(nothing))


async def test_an_exception_can_be_retried() -> None:
    async def lost(*_: object) -> None:
        raise RuntimeError("the replica is gone")

    check_retryable(await answer(lost))


@pytest.mark.parametrize("status", [200, 400, 422])
async def test_other_answers_pass(status: int) -> None:
    response = await answer(PlainTextResponse("as it was", status_code=status))
    assert (response.status_code, response.text) == (status, "as it was")


@pytest.mark.parametrize("status", [404, 429, 500, 503])
async def test_the_ingress_own_failure_passes(status: int) -> None:
    problem = JSONResponse({"detail": "a damaged file"}, status_code=status, media_type="application/problem+json")
    response = await answer(problem)
    assert (response.status_code, response.json()) == (status, {"detail": "a damaged file"})


async def test_a_response_that_has_begun_breaks_off() -> None:
    async def pieces():
        yield b"one"
        raise RuntimeError("the replica is gone")

    with pytest.raises(RuntimeError, match="gone"):
        await answer(StreamingResponse(pieces()))


def test_serve_loads_it_by_name() -> None:
    assert [middleware.cls for middleware in middlewares()] == [RetryableFailures]
