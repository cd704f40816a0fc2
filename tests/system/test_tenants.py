"""A running server takes up keys and quotas without losing a request; then tenants do not see each other."""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import yaml

from tests.support.documents import check_exact, text
from tests.support.server import ROOT, Server, check_problem, follow
from tests.support.waiting import PATIENCE_S, wait_until

CLIENTS = 4
QUOTAS = {
    "small": {"memories": 1, "jobs": 1},
    "few": {"tokens": 300},
    "tight": {"bytes": 120_000},
    "slow": {"requests_per_minute": 5},
}
TENANTS = ("default", "acme", "zeta", *QUOTAS)


@dataclass
class Keyed:
    """The server with keys on, and what happened while they were turned on."""

    server: Server
    keys: dict[str, str]  # by tenant
    statuses: list[int]  # of the requests during the reload
    versions: set[str]  # of chronicle, that they were answered from

    def client(self, tenant: str) -> httpx.Client:
        return self.server.client(headers=bearer(self.keys[tenant]))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def new_key(server: Server, tenant: str) -> str:
    return json.loads(server.memorag("keys", "create", tenant, "--json").stdout)["key"]


@pytest.fixture(scope="module")
def keyed(server: Server, chronicle: dict, tmp_path_factory) -> Iterator[Keyed]:
    keys = {tenant: new_key(server, tenant) for tenant in TENANTS}
    profile = yaml.safe_load((ROOT / "serving" / "profiles" / "embedded.yaml").read_text())
    profile |= {"auth": {"mode": "keys"}, "quotas": {"tenants": QUOTAS}}
    path = tmp_path_factory.mktemp("profile") / "keys.yaml"
    path.write_text(yaml.safe_dump(profile))
    try:
        statuses, versions = asyncio.run(reload_under_load(server, str(path), keys["default"]))
        yield Keyed(server, keys, statuses, versions)
        with server.client() as client:
            for tenant in TENANTS[1:]:
                headers = bearer(keys[tenant])
                listed = client.get("/v1/memories", headers=headers)
                for memory in listed.json().get("memories", ()):
                    client.delete(f"/v1/memories/{memory['id']}", headers=headers)
    finally:
        if "MEMORAG_TEST_STORAGE" in os.environ:  # else the server ends now: these tests are the last on it
            server.memorag("reload", "--profile", "embedded")


async def reload_under_load(server: Server, profile: str, key: str) -> tuple[list[int], set[str]]:
    """Turns keys on while clients, who have one already, ask one question after another."""
    ended = asyncio.Event()
    statuses: list[int] = []
    versions: set[str] = set()

    async def keep_asking(number: int) -> None:
        body = {"question": f"Who became keeper number {number}?", "max_tokens": 2}
        more = 2
        while more:  # so many of the new replicas, too
            more -= ended.is_set()
            response = await client.post("/v1/memories/chronicle/answer", json=body)
            statuses.append(response.status_code)
            versions.update([response.json().get("version", response.text)])

    async with (
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, headers=bearer(key)) as client,
        asyncio.TaskGroup() as group,
    ):
        for number in range(CLIENTS):
            group.create_task(keep_asking(number))
        try:
            await asyncio.to_thread(server.memorag, "reload", "--profile", profile)
        finally:
            ended.set()
    return statuses, versions


def test_no_request_fails_while_the_profile_changes(keyed: Keyed, chronicle: dict):
    assert len(keyed.statuses) > 3 * CLIENTS and set(keyed.statuses) == {200}
    assert keyed.versions == {chronicle["version"]}
    status = json.loads((keyed.server.storage / "server.json").read_text())
    assert status["profile"].endswith("keys.yaml") and status["reload_error"] is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("mr_00000000_" + "x" * 43),
        bearer("x" * 10_000),
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)
def test_every_route_wants_a_key(keyed: Keyed, headers: dict):
    with keyed.server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        routes = [(m, path) for path, methods in paths.items() if path.startswith("/v1/") for m in methods]
        assert len(routes) > 12
        for method, path in routes:
            path = path.format(memory="chronicle", document="chronicle.txt", model="memorag/chronicle")
            response = client.request(method, path, headers=headers)
            if path.startswith(("/v1/models", "/v1/chat")):
                error = response.json()["error"]
                assert response.status_code == 401 and error["type"] == "authentication_error"
                assert "API key" in error["message"]
            else:
                check_problem(response, 401, "API key")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz", "/"):
            assert client.get(path).status_code == 200


def test_two_tenants_with_the_same_id_have_two_memories(keyed: Keyed):
    texts = {tenant: text(tenant, "own", 20) for tenant in ("acme", "zeta")}
    question = {"question": "Who lit the lamp?", "max_tokens": 4}
    for tenant, words in texts.items():
        with keyed.client(tenant) as client:
            body = {"id": "same", "tags": ["tag"], "documents": [{"id": "d", "text": words}]}
            assert client.post("/v1/memories", json=body).status_code == 202
            assert follow(client, "same")[-1][0] == "ready"
    for tenant, words in texts.items():
        with keyed.client(tenant) as client:
            assert [m["id"] for m in client.get("/v1/memories").json()["memories"]] == ["same"]
            assert client.get("/v1/memories/same/documents/d").text == words
            for path, body in (("/v1/memories/same/answer", {}), ("/v1/answer", {"tag": "tag"})):
                answer = client.post(path, json=question | body).json()
                assert answer["passages"] and len(answer["memories"]) == 1
                check_exact(answer["passages"] + answer["evidence"], {"same": {"d": words}})
            used = client.get("/v1/usage").json()
            assert (used["tenant"], used["memories"], used["jobs"]) == (tenant, 1, 0) and used["tokens"] > 0


def test_another_tenants_memory_is_as_if_it_were_not_there(keyed: Keyed):
    with keyed.client("acme") as client:
        body = {"id": "private", "documents": [{"id": "d", "text": "A private matter of acme."}]}
        assert client.post("/v1/memories", json=body).status_code in (202, 409)
        assert follow(client, "private")[-1][0] == "ready"
        before = client.get("/v1/memories/private").json()
    ask = {"question": "What matter?"}
    routes = [
        ("GET", "", {}), ("DELETE", "", {}), ("GET", "/events", {}), ("GET", "/archive", {}), ("DELETE", "/job", {}),
        ("GET", "/documents/d", {}), ("DELETE", "/documents/d", {}), ("PUT", "/documents/d", {"json": {"text": "x"}}),
        ("PUT", "/documents/new", {"json": {"text": "x"}, "headers": {"If-Match": f'"{before["version"]}"'}}),
        ("POST", "/answer", {"json": ask}), ("POST", "/answer", {"json": ask | {"stream": True}}),
        ("POST", "/summary", {"json": {}}), ("POST", "/clues", {"json": ask}), ("POST", "/passages", {"json": ask}),
    ]  # fmt: skip
    with keyed.client("zeta") as client:
        for method, rest, arguments in routes:
            there = client.request(method, f"/v1/memories/private{rest}", **arguments)
            nowhere = client.request(method, f"/v1/memories/nowhere{rest}", **arguments)
            check_problem(there, 404, "private")
            assert there.text.replace("private", "nowhere") == nowhere.text
        check_problem(client.post("/v1/answer", json=ask | {"memories": ["private"]}), 404, "private")
        assert "private" not in client.get("/v1/memories").text
    with keyed.client("acme") as client:
        assert client.get("/v1/memories/private").json() == before


def test_a_key_is_revoked_without_a_restart(keyed: Keyed):
    key = new_key(keyed.server, "acme")
    with keyed.server.client(headers=bearer(key)) as client:
        wait_until(lambda: client.get("/v1/usage").status_code == 200)
        assert client.get("/v1/usage").json()["tenant"] == "acme"
        keyed.server.memorag("keys", "revoke", key.split("_")[1])
        wait_until(lambda: client.get("/v1/usage").status_code == 401)
        check_problem(client.get("/v1/usage"), 401, "revoked")
    with keyed.client("acme") as client:
        assert client.get("/v1/usage").status_code == 200, "the tenant's other key goes on"


def test_the_command_line_takes_the_key_from_the_environment(keyed: Keyed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MEMORAG_API_KEY", raising=False)
    refused = keyed.server.memorag("memories", check=False)
    assert refused.returncode == 1 and "API key" in refused.stderr
    monkeypatch.setenv("MEMORAG_API_KEY", keyed.keys["default"])
    assert "chronicle" in keyed.server.memorag("memories").stdout


def check_quota(response: httpx.Response, words: str) -> None:
    check_problem(response, 429, words)
    assert int(response.headers["retry-after"]) > 0


def test_memories_and_jobs_are_limited(keyed: Keyed):
    long, short = text("long", "only", 3000), "A short text."
    with keyed.client("small") as client:
        usage = client.get("/v1/usage").json()
        assert usage["quota"] == dict.fromkeys(usage["quota"]) | QUOTAS["small"]
        assert client.post("/v1/memories", json={"id": "a", "documents": [{"text": long}]}).status_code == 202
        assert client.get("/v1/usage").json()["jobs"] == 1
        check_quota(client.post("/v1/memories", json={"id": "b", "documents": [{"text": short}]}), "jobs at a time")
        assert client.delete("/v1/memories/a").status_code == 204
        assert client.post("/v1/memories", json={"id": "a", "documents": [{"text": short}]}).status_code == 202
        assert follow(client, "a")[-1][0] == "ready"
        check_quota(client.post("/v1/memories", json={"id": "b", "documents": [{"text": short}]}), "2 memories")
        archive = client.get("/v1/memories/a/archive").content
        imported = client.post("/v1/memories?id=c", content=archive, headers={"content-type": "application/x-tar"})
        check_quota(imported, "2 memories")
        assert client.put("/v1/memories/a/documents/more", json={"text": short}).status_code == 202
        assert client.get("/v1/usage").json()["memories"] == 1


@pytest.mark.parametrize(("tenant", "what"), [("few", "tokens"), ("tight", "bytes")])
def test_tokens_and_bytes_are_limited(keyed: Keyed, tenant: str, what: str):
    with keyed.client(tenant) as client:
        assert client.post("/v1/memories", json={"id": "a", "documents": [{"text": "Short."}]}).status_code == 202
        assert follow(client, "a")[-1][0] == "ready"
        put = client.put("/v1/memories/a/documents/more", json={"text": text("more", "only", 50)})
        assert put.status_code == 202, "how long it is, only the job finds"
        name, data = follow(client, "a")[-1]
        error = data["failed_change"]["error"]
        assert name == "failed" and f"your quota is {QUOTAS[tenant][what]:,}" in error and what in error
        assert data["status"] == "ready" and [d["id"] for d in data["documents"]] == ["doc-1"]
        assert client.get("/v1/usage").json()[what] <= QUOTAS[tenant][what]


def test_requests_are_limited(keyed: Keyed):
    with keyed.client("slow") as client:
        responses = [client.get("/v1/usage") for _ in range(8)]
        refused = [response for response in responses if response.status_code == 429]
        assert [r.status_code for r in responses[:5]] == [200] * 5 and len(refused) >= 2
        for response in refused:
            check_quota(response, "more than 5 requests a minute")
            assert int(response.headers["retry-after"]) <= 13
    with keyed.client("zeta") as client:
        assert client.get("/v1/usage").status_code == 200
