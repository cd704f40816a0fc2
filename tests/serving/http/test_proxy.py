"""What the proxy answers of its own when a replica dies can be retried; what the Ingress answers passes unchanged."""

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.config import APPLICATION
from serving.http.proxy import RetryableFailures, middlewares


class Proxy:
    """As Serve's, with these applications by prefix; what is asked of any of them comes to `app`. None: it starts."""

    def __init__(self, app: ASGIApp, applications: dict[str, str] | None) -> None:
        self._app, self.applications = app, applications

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/-/routes":
            scope["root_path"] = scope["path"] = "/changed"
            await self._app(scope, receive, send)
        elif self.applications is None:
            await PlainTextResponse("no routes yet", status_code=503)(scope, receive, send)
        else:
            await JSONResponse(self.applications)(scope, receive, send)


async def answer(
    app: ASGIApp, applications: dict[str, str] | None = None, path: str = "/v1/memories/book"
) -> httpx.Response:
    transport = httpx.ASGITransport(
        RetryableFailures(Proxy(app, {"/": APPLICATION} if applications is None else applications))
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


def check_retryable(response: httpx.Response) -> None:
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == 503 and "try again" in response.json()["detail"]


@pytest.mark.parametrize("status", [404, 408, 429, 500, 503])
async def test_the_proxys_own_failures_can_be_retried(status: int) -> None:
    response = await answer(PlainTextResponse("Internal Server Error: ActorDiedError(secret)", status_code=status))
    check_retryable(response)
    assert "secret" not in response.text


async def test_openais_routes_fail_in_openais_shape() -> None:
    lost = await answer(PlainTextResponse("Internal Server Error", status_code=500), path="/v1/chat/completions")
    assert lost.status_code == 503 and lost.json()["error"]["type"] == "server_error"
    missing = JSONResponse({"error": {"message": "no such model"}}, status_code=404)
    assert (await answer(missing, path="/v1/models/x")).json() == {"error": {"message": "no such model"}}


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


OTHERS = {"/": APPLICATION, "/other": "other", "/v1/chat": "chat"}


@pytest.mark.parametrize("status", [404, 408, 429, 500, 503])
@pytest.mark.parametrize(
    ("applications", "path"),
    [
        (OTHERS, "/other"),
        (OTHERS, "/other/v1/memories"),
        (OTHERS, "/v1/chat/completions"),
        ({"/memorag": APPLICATION, "/": "other"}, "/v1/memories"),
        ({"/memorag": APPLICATION}, "/v1/memories"),  # nobody's: the proxy's own 404
        ({"/other": "other"}, "/elsewhere"),
    ],
)
async def test_other_applications_failures_are_theirs(status: int, applications: dict[str, str], path: str) -> None:
    response = await answer(PlainTextResponse("theirs", status_code=status), applications, path)
    assert (response.status_code, response.text) == (status, "theirs")


async def test_an_exception_of_another_application_is_not_hidden() -> None:
    async def lost(*_: object) -> None:
        raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"):
        await answer(lost, OTHERS, "/other")


@pytest.mark.parametrize("path", ["/otherwise", "/v1/chats", "/v1/memories"])
async def test_a_prefix_ends_where_a_part_of_the_path_does(path: str) -> None:
    check_retryable(await answer(PlainTextResponse("a dead replica", status_code=500), OTHERS, path))


@pytest.mark.parametrize("applications", [{}, {"/other": "other"}, None])
@pytest.mark.parametrize("path", ["/v1/memories/book", "/readyz", "/healthz", "/"])
async def test_nobody_is_told_that_there_is_no_memory_before_the_proxy_knows_the_ingress(
    applications: dict[str, str] | None, path: str
) -> None:
    proxy = RetryableFailures(Proxy(PlainTextResponse("Path not found", status_code=404), applications))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(proxy), base_url="http://test") as client:
        check_retryable(await client.get(path))


async def test_a_proxy_that_drains_still_knows_whose_a_path_is() -> None:
    inner = Proxy(PlainTextResponse("theirs", status_code=500), {"/": APPLICATION, "/v1/chat": "chat"})
    proxy = RetryableFailures(inner)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(proxy), base_url="http://test") as client:
        for _ in range(2):
            assert (await client.get("/v1/chat/completions")).status_code == 500
            inner.applications = None


def test_serve_loads_it_by_name() -> None:
    assert [middleware.cls for middleware in middlewares()] == [RetryableFailures]
