"""Documents of a memory come and go, and every answer is exactly of one version of it."""

import asyncio
import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.documents import check_exact, docx, put, text
from tests.support.server import Server, check_problem, follow, memorize
from tests.support.waiting import PATIENCE_S


@pytest.fixture
def memory(server: Server) -> Iterator[dict]:
    """A memory of two documents, `one` and `two`, in their first edition."""
    id = f"docs-{uuid.uuid4().hex[:8]}"
    documents = [{"id": name, "text": text(name, "first")} for name in ("one", "two")]
    made = memorize(server, documents, id=id)
    yield made
    with server.client() as client:
        client.delete(f"/v1/memories/{id}")


FORMS = {
    "json": lambda words: {"json": {"text": words}},
    "plain": lambda words: {"content": words.encode(), "headers": {"content-type": "text/plain"}},
    "txt": lambda words: {"files": {"file": ("any.txt", words.encode())}},
    "html": lambda words: {"files": {"file": ("any.html", f"<p>{words}</p>".encode())}},
    "docx": lambda words: {"files": {"file": ("any.docx", docx(words))}},
}


@pytest.mark.parametrize(
    "form", [form if form in ("json", "docx") else pytest.param(form, marks=pytest.mark.long) for form in FORMS]
)
def test_put_adds_and_replaces_and_only_that_document_is_memorized(server: Server, memory: dict, form: str):
    id, before = memory["id"], memory
    with server.client() as client:
        for document, edition in (("new", "first"), ("one", "second")):
            words = text(document, edition)
            response = client.put(f"/v1/memories/{id}/documents/{document}", **FORMS[form](words))
            assert response.status_code == 202, response.text
            assert response.headers["etag"] == f'"{before["version"]}"' and response.json()["status"] == "ready"
            events = follow(client, id)
            assert events[-1][0] == "ready"
            after = events[-1][1]
            tokens = {entry["id"]: entry["tokens"] for entry in after["documents"]}
            totals = {data["total_tokens"] for name, data in events if name == "progress"} - {0}
            assert totals <= {tokens[document]}, "more than the new document was memorized"
            check_others_are_the_same_files(server, id, before["version"], after["version"], document)
            source = client.get(f"/v1/memories/{id}/documents/{document}").text
            assert source.strip() == words
            found = client.post(f"/v1/memories/{id}/passages", json={"question": words[:200]}).json()
            assert found["version"] == after["version"] and any(p["document"] == document for p in found["passages"])
            texts = {"one": text("one", "first"), "two": text("two", "first"), "new": source} | {document: source}
            check_exact(found["passages"], {id: texts | {"new": text("new", "first")} | {document: source}})
            before = after
    assert [entry["id"] for entry in before["documents"]] == ["one", "two", "new"]


def check_others_are_the_same_files(server: Server, id: str, old: str, new: str, document: str) -> None:
    was, now = server.manifest(id, old), server.manifest(id, new)
    assert now["parent"] == old and now["head"] == was["head"]
    others = {entry["id"]: entry for entry in was["documents"] if entry["id"] != document}
    assert {entry["id"]: entry for entry in now["documents"] if entry["id"] != document} == others
    [changed] = [entry for entry in now["documents"] if entry["id"] == document]
    files = [changed["source"], changed["passages"], *(f for s in changed["segments"] for f in s["files"])]
    assert all(f"/{new}/" in file["path"] for file in files)


def test_a_deleted_document_is_seen_by_no_question(server: Server, memory: dict):
    id, question = memory["id"], {"question": text("one", "first")[:100]}
    with server.client() as client:
        before = client.post(f"/v1/memories/{id}/passages", json=question).json()
        assert "one" in {p["document"] for p in before["passages"]}
        deleted = client.delete(f"/v1/memories/{id}/documents/one")
        assert deleted.status_code == 200 and deleted.headers["etag"] == f'"{deleted.json()["version"]}"'
        after = client.post(f"/v1/memories/{id}/answer", json=question | {"max_tokens": 4}).json()
        assert after["version"] == deleted.json()["version"] != memory["version"]
        assert {p["document"] for p in after["passages"] + after["evidence"]} == {"two"}
        check_problem(client.get(f"/v1/memories/{id}/documents/one"), 404, "it has two")
        assert client.get(f"/v1/memories/{id}").json()["documents"] == memory["documents"][1:]
        check_problem(client.delete(f"/v1/memories/{id}/documents/two"), 409, "delete the memory instead")
        check_problem(client.delete(f"/v1/memories/{id}/documents/one"), 404, "has no document 'one'")
    assert server.manifest(id, after["version"])["documents"] == server.manifest(id, memory["version"])["documents"][1:]


def test_changes_may_name_the_version_they_are_of(server: Server, memory: dict):
    id, first = memory["id"], memory["version"]
    with server.client() as client:
        assert client.get(f"/v1/memories/{id}").headers["etag"] == f'"{first}"'
        assert put(client, id, "new", text("new", "first"), **{"If-Match": f'"{first}"'}).status_code == 202
        second = follow(client, id)[-1][1]["version"]
        assert client.get(f"/v1/memories/{id}").headers["etag"] == f'"{second}"' != f'"{first}"'
        stale = {"If-Match": f'"{first}"'}
        check_problem(put(client, id, "new", "words", **stale), 412, second)
        check_problem(client.delete(f"/v1/memories/{id}/documents/new", headers=stale), 412, second)
        for wrong in (second, f'W/"{second}"', f'"{second}", "{first}"', '""', '"'):
            check_problem(put(client, id, "new", "words", **{"If-Match": wrong}), 400, "one ETag")
        with_star = client.delete(f"/v1/memories/{id}/documents/new", headers={"If-Match": "*"})
        assert with_star.status_code == 200
        good = {"If-Match": f'"{with_star.json()["version"]}"'}
        assert client.delete(f"/v1/memories/{id}/documents/one", headers=good).status_code == 200
        assert [d["id"] for d in client.get(f"/v1/memories/{id}").json()["documents"]] == ["two"]


@pytest.mark.parametrize("names_version", [True, False])
def test_of_two_writers_one_wins_and_nothing_is_mixed(server: Server, memory: dict, names_version: bool):
    id = memory["id"]
    editions = {"left": text("shared", "left", 400), "right": text("shared", "right", 400)}
    headers = {"If-Match": f'"{memory["version"]}"'} if names_version else {}
    together = threading.Barrier(2)

    def write(edition: str) -> tuple[str, httpx.Response]:
        with server.client() as client:
            together.wait()
            return edition, put(client, id, "shared", editions[edition], **headers)

    with ThreadPoolExecutor(2) as threads:
        responses = dict(threads.map(write, editions))
    assert sorted(response.status_code for response in responses.values()) == [202, 412]
    for response in responses.values():
        if response.status_code == 412:
            check_problem(response, 412)
    [winner] = [edition for edition, response in responses.items() if response.status_code == 202]
    with server.client() as client:
        after = follow(client, id)[-1][1]
        assert client.get(f"/v1/memories/{id}/documents/shared").text == editions[winner]
        found = client.post(f"/v1/memories/{id}/passages", json={"question": "the edition of shared"}).json()
    assert found["passages"]
    check_exact(found["passages"], {id: {"shared": editions[winner]} | first_editions()})
    assert [d["id"] for d in after["documents"]] == ["one", "two", "shared"]


def first_editions() -> dict[str, str]:
    return {name: text(name, "first") for name in ("one", "two")}


async def test_questions_go_on_with_the_old_version_during_a_change(server: Server, memory: dict):
    id, old = memory["id"], memory["version"]
    large = text("one", "second", 400)
    seen: list[dict] = []

    async def keep_asking(client: httpx.AsyncClient, ended: asyncio.Event, number: int) -> None:
        while not ended.is_set():
            body = {"question": f"Who lit lamp {number} of one?", "task": "rag", "max_tokens": 2}
            response = await client.post(f"/v1/memories/{id}/answer", json=body)
            assert response.status_code == 200, response.text
            seen.append(response.json())

    ended = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client, asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(keep_asking(client, ended, number))
        response = await client.put(f"/v1/memories/{id}/documents/one", json={"text": large})
        assert response.status_code == 202
        began = len(seen)
        info = response.json()
        while info["job"]:
            await asyncio.sleep(0.1)
            info = (await client.get(f"/v1/memories/{id}")).json()
        new, during = info["version"], seen[began:]
        body = {"question": "Who lit lamp 7 of one?", "task": "rag", "max_tokens": 2}
        last = (await client.post(f"/v1/memories/{id}/answer", json=body)).json()
        ended.set()
    assert sum(answer["version"] == old for answer in during) > 2 and last["version"] == new != old
    texts = {old: first_editions(), new: first_editions() | {"one": large}}
    for answer in [*seen, last]:
        assert answer["passages"]
        check_exact(answer["passages"] + answer["evidence"], {id: texts[answer["version"]]})


def test_unknown_memories_and_documents(server: Server, memory: dict):
    id = memory["id"]
    with server.client() as client:
        check_problem(put(client, "nothing", "a", "words"), 404, "nothing")
        check_problem(client.delete("/v1/memories/nothing/documents/a"), 404, "nothing")
        check_problem(client.delete(f"/v1/memories/{id}/documents/nothing"), 404, "it has one, two")
        check_problem(client.delete(f"/v1/memories/{id}/job"), 409, "no job")
        check_problem(client.delete("/v1/memories/nothing/job"), 404, "nothing")
        check_problem(client.get("/v1/memories/nothing/archive"), 404, "nothing")


def test_jobs_can_be_cancelled(server: Server, memory: dict):
    id, long = memory["id"], text("one", "second", 3000)
    with server.client() as client:
        created = client.post("/v1/memories", json={"id": "cancelled", "documents": [{"text": long}]})
        assert created.status_code == 202 and created.json()["job"]["kind"] == "create"
        check_problem(put(client, "cancelled", "a", "words"), 409, "still being made")
        assert client.delete("/v1/memories/cancelled/job").status_code == 204
        name, data = follow(client, "cancelled")[-1]
        assert (name, data["status"], data["error"], data["job"]) == ("failed", "failed", "it was cancelled", None)
        question = {"question": "Who?"}
        check_problem(client.post("/v1/memories/cancelled/answer", json=question), 409, "it was cancelled")
        again = memorize(server, [{"text": "A short text of a bell."}], id="cancelled")
        assert again["error"] is None and again["version"] != created.json()["version"]
        client.delete("/v1/memories/cancelled")

        assert put(client, id, "one", long).json()["job"]["kind"] == "put"
        assert client.delete(f"/v1/memories/{id}/job").status_code == 204
        name, data = follow(client, id)[-1]
        assert (name, data["status"], data["error"]) == ("failed", "ready", None)
        assert data["failed_change"]["error"] == "it was cancelled"
        assert data["version"] == memory["version"] and data["documents"] == memory["documents"]
        answer = client.post(f"/v1/memories/{id}/answer", json={"question": "Who lit lamp 3?", "max_tokens": 2}).json()
        assert answer["version"] == memory["version"]
        check_exact(answer["passages"], {id: first_editions()})
        assert put(client, id, "one", text("one", "third")).status_code == 202
        assert follow(client, id)[-1][1]["failed_change"] is None


def test_events_tell_rate_and_time_left(server: Server):
    with server.client() as client:
        client.post("/v1/memories", json={"id": "paced", "documents": [{"text": text("one", "first", 600)}]})
        events = follow(client, "paced")
        client.delete("/v1/memories/paced")
    progress = [data for name, data in events if name == "progress"]
    assert [name for name, _ in events[-2:]] == ["progress", "ready"]
    done = [data["done_tokens"] for data in progress]
    assert done == sorted(done) and {p["total_tokens"] for p in progress} - {0} == {events[-1][1]["tokens"]}
    moving = [data for data in progress if 0 < data["done_tokens"] < data["total_tokens"]]
    assert moving and all(data["tokens_per_second"] > 0 and data["seconds_left"] > 0 for data in moving)
    for data in moving:
        left = (data["total_tokens"] - data["done_tokens"]) / data["tokens_per_second"]
        assert data["seconds_left"] == pytest.approx(left)


def test_events_of_a_memory_that_is_deleted_end_with_that(server: Server):
    long = text("one", "first", 3000)
    with server.client() as client, server.client() as other:
        client.post("/v1/memories", json={"id": "gone", "documents": [{"text": long}]})
        with client.stream("GET", "/v1/memories/gone/events") as response:
            lines = response.iter_lines()
            assert next(lines) == "event: progress"
            assert other.delete("/v1/memories/gone").status_code == 204
            rest = [line for line in lines if line]
    assert rest[-2] == "event: error" and json.loads(rest[-1].removeprefix("data: "))["status"] == 404


def test_several_memories_are_asked_at_once(server: Server):
    texts = {f"shelf-{i}": {"same": text(f"shelf {i}", "only")} for i in range(3)}
    for id, documents in texts.items():
        tags = ["shelf", "odd"] if id.endswith("1") else ["shelf"]
        memorize(server, [{"id": name, "text": words} for name, words in documents.items()], id=id, tags=tags)
    question = {"question": "Who lit the lamp of shelf 0, of shelf 1 and of shelf 2?", "max_tokens": 4}
    with server.client() as client:
        by_ids = client.post("/v1/answer", json=question | {"memories": ["shelf-2", "shelf-0"]}).json()
        assert [m["id"] for m in by_ids["memories"]] == ["shelf-2", "shelf-0"] and by_ids["memory"] is None
        assert by_ids["passages"] and {p["memory"] for p in by_ids["passages"]} <= {"shelf-0", "shelf-2"}
        for shelf in (0, 2):
            asked = {"question": f"Who lit the lamp of shelf {shelf}?", "max_tokens": 4, "task": "rag"}
            best = client.post("/v1/answer", json=asked | {"memories": ["shelf-2", "shelf-0"]}).json()["passages"][0]
            assert best["memory"] == f"shelf-{shelf}"
        by_tag = client.post("/v1/answer", json=question | {"tag": "shelf", "task": "rag"}).json()
        assert {m["id"] for m in by_tag["memories"]} == set(texts) and by_tag["passages"]
        one = client.post("/v1/answer", json=question | {"tag": "odd", "memories": ["shelf-1"]}).json()
        assert one["memory"] == "shelf-1" and [m["id"] for m in one["memories"]] == ["shelf-1"]
        for answer in (by_ids, by_tag, one):
            assert answer["degraded"] == ["embedded-model"]
            check_exact(answer["passages"] + answer["evidence"], texts)
        listed = client.get("/v1/memories", params={"tag": "shelf", "limit": 2}).json()
        assert [m["id"] for m in listed["memories"]] == ["shelf-0", "shelf-1"] and listed["next_cursor"]
        check_problem(client.post("/v1/answer", json=question | {"memories": ["shelf-0", "no"]}), 404, "'no'")
        check_problem(client.post("/v1/answer", json=question | {"tag": "none"}), 404, "no ready memory has the tag")
        check_problem(client.post("/v1/answer", json=question), 422, "no memory is named")
        for id in texts:
            client.delete(f"/v1/memories/{id}")
