"""Hundreds of generated requests, and tricks that people have played: what the OpenAPI document says, and no 5xx."""

import socket
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks

from tests.support.server import Server, check_problem, memorize
from tests.support.waiting import PATIENCE_S

TARGET = "generated"  # the memory that some of the requests are about
ENGINES = ("/answer", "/summary", "/clues")  # what makes a model write: few of these requests reach one
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def target(server: Server) -> Iterator[set[str]]:
    """A memory to aim at; what generated requests create is deleted at the end."""
    with server.client() as client:
        before = ids(client)
        memorize(server, [{"id": "a", "text": "A bell of bronze."}, {"id": "b", "text": "A rope."}], id=TARGET)
        yield before
        for id in ids(client) - before:
            client.delete(f"/v1/memories/{quote(id, safe='')}")
        assert ids(client) == before


def ids(client: httpx.Client) -> set[str]:
    found, cursor = set(), None
    while True:
        page = client.get("/v1/memories", params={"limit": 1000} | ({"cursor": cursor} if cursor else {})).json()
        found |= {memory["id"] for memory in page["memories"]}
        if (cursor := page["next_cursor"]) is None:
            return found


@pytest.mark.long
@pytest.mark.parametrize("cases", [50])  # of each operation, valid and invalid
def test_generated_requests_are_answered_as_documented(server: Server, target: set[str], cases: int):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter = Counter()
    session = requests.Session()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            number = 0

            @settings(
                max_examples=cases,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Case) -> None:
                nonlocal number
                number += 1
                aim(case, number)
                response = case.call(session=session, timeout=PATIENCE_S)
                statuses[response.status_code] += 1
                if response.status_code >= 500:
                    assert response.status_code == 503, f"{case.as_curl_command()}\n{response.text}"
                if response.status_code in (429, 503):
                    assert response.headers["retry-after"][0].isdigit()
                case.validate_response(response, checks=CHECKS)

            try:
                check()
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE and not number, "what takes anything has no invalid requests"
    print(dict(statuses))
    assert sum(statuses.values()) >= 15 * cases, statuses
    assert {200, 202, 404, 422} <= set(statuses) and statuses[200] > cases * 3 // 4
    with server.client() as client:
        answer = client.post(f"/v1/memories/{TARGET}/answer", json={"question": "What bell?", "max_tokens": 2})
        assert answer.status_code == 200, "the server is as well as before"


def aim(case: Case, number: int) -> None:
    """Has some requests be about a memory that there is; never one that deletes it."""
    parameters = case.path_parameters or {}
    if "memory" not in parameters or (case.method == "DELETE" and case.path.endswith("{memory}")):
        return
    engine = case.path.endswith(ENGINES)
    if number % (12 if engine else 2):
        return
    parameters["memory"] = TARGET
    if "document" in parameters and case.method == "GET":
        parameters["document"] = "b"
    if engine and isinstance(case.body, dict):
        case.body |= {"max_tokens": 2} if "clues" not in case.path else {}
    case.path_parameters = parameters


IDS = [
    "..", ".", "...", "../..", "..\\..", "/etc/passwd", "a/../../b", "%2e%2e", "a%2fb", "..%252f..", "a\0b", "a\nb",
    "a\r\nX-Injected: yes", "\u202etxt.exe", "a\u200bb", "\u0430dmin", "e\u0301", "e" + "\u0301" * 60, "\ufeffa", "é",
    "a b", "a;b", "a'b", 'a"b', "a`b", "$(id)", "{memory}", "~", "-rf", "_a", ".hidden", "CON:", "a" * 129, "a" * 5000,
    "\U0001f4a9", "\uffff", "𝒳", "ａ", "İ", "a\u0300",
]  # fmt: skip
ROUTES = [
    ("GET", "/v1/memories/{}"), ("DELETE", "/v1/memories/{}"), ("GET", "/v1/memories/{}/events"),
    ("GET", "/v1/memories/{}/archive"), ("DELETE", "/v1/memories/{}/job"), ("GET", "/v1/memories/{}/documents/a"),
    ("PUT", "/v1/memories/{}/documents/a"), ("DELETE", "/v1/memories/{}/documents/a"),
    ("POST", "/v1/memories/{}/answer"), ("POST", "/v1/memories/{}/summary"), ("POST", "/v1/memories/{}/clues"),
    ("POST", "/v1/memories/{}/passages"), ("GET", f"/v1/memories/{TARGET}/documents/{{}}"),
    ("PUT", f"/v1/memories/{TARGET}/documents/{{}}"), ("DELETE", f"/v1/memories/{TARGET}/documents/{{}}"),
]  # fmt: skip
BODIES = {"/documents/a": {"text": "x"}, "/documents/{}": {"text": "x"}, "/summary": {}}


def body_of(method: str, route: str) -> dict:
    if method not in ("PUT", "POST"):
        return {}
    return {"json": next((b for end, b in BODIES.items() if route.endswith(end)), {"question": "Who?"})}


def everything(server: Server) -> set[str]:
    """Names of all that lies in the storage, folders of tenants included."""
    return {str(path) for root in (server.storage, server.storage / "memories") for path in root.iterdir()}


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.long)])
def test_ids_that_play_tricks(server: Server, target: set[str], every: int):
    """Every id on some routes, and on every route some ids; in the long form, all on all."""
    before = everything(server)
    with server.client() as client:
        there = ids(client)
        for number, (method, route) in enumerate(ROUTES):
            for id in IDS[number % every :: every]:
                path = route.format(quote(id, safe="").replace(".", "%2E"))
                response = client.request(method, path, **body_of(method, route))
                assert 400 <= response.status_code < 500, (method, path, response.text)
                assert response.headers["content-type"] == "application/problem+json", (method, path)
                assert "x-injected" not in response.headers
        for id in IDS[::every]:
            ask = {"question": "Who?", "max_tokens": 2}
            for body in ({"memories": [id]}, {"tag": id}):
                assert 400 <= client.post("/v1/answer", json=ask | body).status_code < 500
            document = {"text": "x"}
            for body in ({"id": id, "documents": [document]}, {"documents": [document | {"id": id}]}):
                check_problem(client.post("/v1/memories", json=body), 422, "id")
            check_problem(client.post("/v1/memories", data={"id": id}, files={"files": ("a.txt", b"x")}), 422, "id")
            assert client.get("/v1/memories", params={"cursor": id, "tag": id}).json()["memories"] == []
        assert ids(client) == there
    assert everything(server) == before


NAMES = ["a/b.txt", "..\\b.txt", "x" * 400 + ".txt", "\u202etxt.html", ".txt", "a.txt\0.html"]


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(id, marks=pytest.mark.long) for id in IDS)])
def test_file_names_that_play_tricks(server: Server, target: set[str], name: str):
    """A name that has no text file's end is refused; another gives an id of letters that ids may have, and no path."""
    before = everything(server)
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\nwords\r\n--x--\r\n'
    escaped = name.replace("\\", "\\\\").replace('"', "%22").encode(errors="replace")
    with server.client() as client:
        response = client.post(
            "/v1/memories", content=part % escaped, headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert response.status_code == 202 or 400 <= response.status_code < 500, response.text
        if response.status_code == 202:
            [document] = response.json()["documents"]
            assert set(document["id"]) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
            assert document["id"][0] not in "._-" and len(document["id"]) <= 128
            assert client.delete(f"/v1/memories/{response.json()['id']}").status_code == 204
        assert everything(server) == before


HEADERS = {
    "two content types": [("content-type", "application/json"), ("content-type", "text/plain")],
    "a content type of bytes": [("content-type", b"\xff\xfe")],
    "an endless content type": [("content-type", "application/json;" + "a=b;" * 3000)],
    "a boundary of nothing": [("content-type", "multipart/form-data; boundary=")],
    "a boundary of bytes": [("content-type", b"multipart/form-data; boundary=\xff")],
    "an unknown charset": [("content-type", "text/plain; charset=utf-9")],
    "If-Match without quotes": [("content-type", "text/plain"), ("if-match", "v1")],
    "If-Match of bytes": [("content-type", "text/plain"), ("if-match", b'"\xff"')],
    "If-Match twice": [("content-type", "text/plain"), ("if-match", '"a"'), ("if-match", '"b"')],
    "If-Match without end": [("content-type", "text/plain"), ("if-match", '"' + "a" * 9000 + '"')],
    "an encoding that is none": [("content-type", "text/csv"), ("content-encoding", "gzip")],
    "another host": [("content-type", "text/csv"), ("host", "evil.example"), ("x-forwarded-host", "evil.example")],
    "bad authorization": [("content-type", "text/csv"), ("authorization", b"Bearer \xff")],
}


@pytest.mark.parametrize("trick", HEADERS)
def test_headers_that_play_tricks(server: Server, target: set[str], trick: str):
    with server.client() as client:
        for method, path in (("POST", "/v1/memories"), ("PUT", f"/v1/memories/{TARGET}/documents/a%20b")):
            response = client.request(method, path, content=b"words", headers=HEADERS[trick])
            assert 400 <= response.status_code < 500, response.text
            assert "evil.example" not in str(response.headers)
        assert client.get(f"/v1/memories/{TARGET}").status_code == 200


@pytest.mark.parametrize("length", ["-1", "1e3", "0x5", "99999999999999999999999", "5, 5", "", " ", "\u0665"])
def test_a_content_length_that_is_none(server: Server, length: str):
    """Refused before it comes to us: bytes that two parties count differently can hide a second request."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        head = f"POST /v1/memories HTTP/1.1\r\nHost: x\r\nContent-Type: text/csv\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + b"words")
        connection.shutdown(socket.SHUT_WR)
        answered = connection.recv(4096)
    assert answered[:9] in (b"HTTP/1.1 ", b"") and answered[9:10] in (b"4", b""), answered
    with server.client() as client:
        assert client.get("/healthz").status_code == 200
