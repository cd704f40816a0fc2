"""Who may not ask is told so before the body is read, and learns nothing of what there is."""

from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request

from cluster.storage.durable import Storage
from serving.errors import ProblemError
from serving.http.gate import Gate, Gated
from serving.http.keys import Authenticator, KeyFile


class Admission:
    """Lets everybody in but those it is told of."""

    def __init__(self) -> None:
        self.refused: dict[str, Exception] = {}
        self.asked: list[str] = []

    async def admit(self, tenant: str) -> None:
        self.asked.append(tenant)
        if tenant in self.refused:
            raise self.refused[tenant]


@pytest.fixture
def gated(tmp_path):
    """An application behind a gate without Ray."""
    storage = Storage(str(tmp_path))
    gate = Gate.__new__(Gate)
    gate.storage, gate._authenticator, gate._admission = storage, Authenticator(storage, "keys"), Admission()
    app = FastAPI()
    app.state.gate = gate
    app.add_middleware(Gated)

    @app.get("/healthz")
    async def healthz() -> str:
        return "ok"

    @app.post("/v1/who")
    async def who(request: Request) -> str:
        return request.state.tenant

    return SimpleNamespace(app=app, keys=KeyFile(storage), admission=gate._admission)


def client(gated) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(gated.app), base_url="http://test")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_key_says_whose_a_request_is(gated) -> None:
    keys = {tenant: gated.keys.create(tenant) for tenant in ("acme", "zeta")}
    async with client(gated) as http:
        for tenant, key in keys.items():
            response = await http.post("/v1/who", headers=bearer(key))
            assert (response.status_code, response.json()) == (200, tenant)
    assert gated.admission.asked == ["acme", "zeta"]


@pytest.mark.parametrize("path", ["/v1/who", "/%76%31/who", "/v1/../v1/who", "/v1/no/such/route"])
async def test_without_a_key_every_path_below_v1_is_closed(gated, path: str) -> None:
    gated.keys.create("acme")
    async with client(gated) as http:
        for headers in ({}, bearer("mr_00000000_" + "x" * 43), {"Authorization": "Basic YTpi"}, bearer("")):
            response = await http.post(path, headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.headers["content-type"] == "application/problem+json"
    assert gated.admission.asked == []


async def test_health_needs_no_key(gated) -> None:
    async with client(gated) as http:
        assert (await http.get("/healthz")).status_code == 200


async def test_the_body_of_a_stranger_is_not_read(gated) -> None:
    async def body():
        raise AssertionError("the body was read")
        yield b""

    async with client(gated) as http:
        assert (await http.post("/v1/who", content=body())).status_code == 401


async def test_too_many_requests_are_told_when_to_come_back(gated) -> None:
    headers = bearer(gated.keys.create("acme"))
    gated.admission.refused["acme"] = ProblemError(429, "slow down", {"retry_after": 7})
    async with client(gated) as http:
        response = await http.post("/v1/who", headers=headers)
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")


async def test_nobody_is_let_in_uncounted(gated) -> None:
    headers = bearer(gated.keys.create("acme"))
    gated.admission.refused["acme"] = TimeoutError()
    async with client(gated) as http:
        response = await http.post("/v1/who", headers=headers)
    assert response.status_code == 503 and "retry-after" in response.headers
