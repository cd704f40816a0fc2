"""The Python client against a small HTTP server that does what a real one seldom does: break off, page, fail.

What it does against the real server is tested in tests/system/.
"""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from email.policy import HTTP

import pytest

from serving import MemoRAG
from serving.client.client import Answer
from serving.client.errors import MemoRAGError, ServerUnreachable
from serving.client.progress import show_progress
from tests.support.answers import ANSWER, PASSAGE

PROGRESS = {"status": "memorizing", "done_tokens": 5, "total_tokens": 10, "tokens_per_second": 2.0, "seconds_left": 2.5}


def memory(status: str, id: str = "m", **fields) -> dict:
    job = {"kind": "create", "state": "running"} if status == "memorizing" else None
    return {"id": id, "status": status, "version": "v1", "documents": [], "job": job, "error": None} | fields


JOB = {"kind": "put", "state": "queued", "version": "v2"}
CANCELLED = {"kind": "put", "version": "v2", "error": "it was cancelled"}


def sse(*events: tuple[str, dict]) -> bytes:
    return "".join(f"event: {name}\r\ndata: {json.dumps(data)}\r\n\r\n" for name, data in events).encode()


class Stub:
    """Answers `METHOD path` with the next of its (status, content type, body, cut off) and records requests."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, str, bytes, bool]]] = {}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.url = ""

    def add(self, route: str, body: object, status: int = 200, kind: str = "application/json", cut: bool = False):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers.setdefault(route, []).append((status, kind, data, cut))

    def events(self, route: str, *events: tuple[str, dict], cut: bool = False):
        self.add(route, sse(*events), kind="text/event-stream", cut=cut)


@pytest.fixture
def stub() -> Iterator[Stub]:
    state = Stub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            route = f"{self.command} {self.path}"
            state.requests.append((route, dict(self.headers), body))
            answers = state.answers[route]
            status, kind, data, cut = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data) + (100 if cut else 0)))  # cut: promises more than comes
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_text_is_sent_as_json_and_waited_for(stub: Stub) -> None:
    stub.add("POST /v1/memories", memory("memorizing"), 202)
    stub.events("GET /v1/memories/m/events", ("progress", PROGRESS), ("ready", memory("ready")))
    stub.add("GET /v1/memories/m", memory("ready"))
    seen: list = []
    with MemoRAG(stub.url + "/", api_key="key") as client:
        made = client.memorize(text="the gate", id="m", kind="gist", ratio=4, progress=seen.append)
    assert made.status == "ready" and seen == [PROGRESS]
    _, headers, body = stub.requests[0]
    assert json.loads(body) == {"id": "m", "kind": "gist", "ratio": 4, "tags": [], "documents": [{"text": "the gate"}]}
    assert headers["Authorization"] == "Bearer key"


def test_files_are_sent_as_multipart(stub: Stub, tmp_path) -> None:
    stub.add("POST /v1/memories", memory("ready"), 202)
    paths = [tmp_path / "one.txt", tmp_path / "two.md"]
    for path in paths:
        path.write_text(f"text of {path.name}")
    with MemoRAG(stub.url) as client:
        client.memorize(*paths, title="Zwei", tags=["a", "b"], ratio=8)
    _, headers, body = stub.requests[0]
    head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
    parts = [
        (part.get_param("name", header="content-disposition"), part.get_filename(), part.get_payload(decode=True))
        for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts()
    ]
    assert sorted(parts, key=str) == sorted(
        [
            ("title", None, b"Zwei"),
            ("ratio", None, b"8"),
            ("tags", None, b"a"),
            ("tags", None, b"b"),
            ("files", "one.txt", b"text of one.txt"),
            ("files", "two.md", b"text of two.md"),
        ],
        key=str,
    )


def test_progress_outlives_broken_connections(stub: Stub) -> None:
    stub.add("POST /v1/memories", memory("memorizing"), 202)
    route = "GET /v1/memories/m/events"
    stub.events(route, ("progress", PROGRESS), cut=True)
    stub.events(route, cut=True)
    stub.events(route, ("progress", PROGRESS), ("ready", memory("ready")))
    stub.add("GET /v1/memories/m", memory("ready"))
    with MemoRAG(stub.url) as client:
        assert client.memorize(text="x", progress=False).status == "ready"
    assert [r for r, *_ in stub.requests].count(route) == 3


def test_a_connection_that_never_holds_is_given_up(stub: Stub) -> None:
    stub.add("POST /v1/memories", memory("memorizing"), 202)
    stub.events("GET /v1/memories/m/events", cut=True)
    with MemoRAG(stub.url) as client, pytest.raises(ServerUnreachable, match="broke off"):
        client.memorize(text="x")


def test_a_failed_memory_is_an_error(stub: Stub) -> None:
    stub.add("POST /v1/memories", memory("memorizing"), 202)
    failed = memory("failed") | {"error": "disk full"}
    stub.events("GET /v1/memories/m/events", ("failed", failed))
    stub.add("GET /v1/memories/m", failed)
    with MemoRAG(stub.url) as client, pytest.raises(MemoRAGError, match="memory 'm' failed: disk full"):
        client.memorize(text="x")


def test_memories_go_over_pages(stub: Stub) -> None:
    stub.add("GET /v1/memories", {"memories": [memory("ready", "a"), memory("ready", "b")], "next_cursor": "b+/"})
    stub.add("GET /v1/memories?cursor=b%2B%2F", {"memories": [memory("failed", "c")], "next_cursor": None})
    with MemoRAG(stub.url) as client:
        assert [(m.id, m.status) for m in client.memories()] == [("a", "ready"), ("b", "ready"), ("c", "failed")]


def test_ask_and_the_stages(stub: Stub) -> None:
    stub.add("GET /v1/memories/m", memory("ready"))
    stub.add("POST /v1/memories/m/answer", ANSWER)
    stub.add("POST /v1/memories/m/summary", ANSWER)
    stub.add("POST /v1/memories/m/clues", {"clues": ANSWER["clues"]})
    stub.add("POST /v1/memories/m/passages", {"passages": [PASSAGE]})
    stub.add("DELETE /v1/memories/m", b"", 204)
    with MemoRAG(stub.url) as client:
        book = client.memory("m")
        answer = book.ask("how often?", max_tokens=7, language="en")
        assert (answer.text, answer.citations[0]["n"], answer.degraded) == ("twice [1]", 1, ["embedded-model"])
        assert answer.clues == ANSWER["clues"] and answer.passages == answer.evidence == [PASSAGE]
        assert answer.timings["total"] == 6.0 and answer.raw == ANSWER
        assert book.summarize() == Answer.of(ANSWER)
        assert book.clues("q") == ANSWER["clues"] and book.passages("q") == [PASSAGE]
        book.delete()
    bodies = {route: json.loads(body) for route, _, body in stub.requests if body}
    asked = {"question": "how often?", "task": "memorag", "max_tokens": 7, "language": "en"}
    assert bodies["POST /v1/memories/m/answer"] == asked
    assert bodies["POST /v1/memories/m/summary"] == {}
    assert bodies["POST /v1/memories/m/clues"] == {"question": "q"}
    assert stub.requests[-1][0] == "DELETE /v1/memories/m"


def test_streams_yield_events_and_raise_their_errors(stub: Stub) -> None:
    stub.add("GET /v1/memories/m", memory("ready"))
    route = "POST /v1/memories/m/answer"
    stub.events(route, ("clue", ANSWER["clues"][0]), ("token", {"text": "twice\n"}), ("done", ANSWER))
    stub.events(route, ("passage", PASSAGE), ("error", {"title": "Unavailable", "status": 503, "detail": "no engine"}))
    with MemoRAG(stub.url) as client:
        events = list(client.memory("m").ask("q", stream=True))
        assert [event.name for event in events] == ["clue", "token", "done"]
        assert events[0].data["text"] == "门 gate" and events[1].data["text"] == "twice\n"
        second = client.memory("m").ask("q", stream=True)
        assert next(second).name == "passage"
        with pytest.raises(MemoRAGError, match="no engine") as caught:
            next(second)
    assert caught.value.status == 503 and caught.value.title == "Unavailable"
    assert json.loads(stub.requests[1][2])["stream"] is True


@pytest.mark.parametrize("call", [lambda c: c.memory("x/../y"), lambda c: c.delete("x/../y")])
def test_problems_become_errors(stub: Stub, call: Callable) -> None:
    problem = {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "there is no memory", "near": "y"}
    for method in ("GET", "DELETE"):
        stub.add(f"{method} /v1/memories/x%2F..%2Fy", problem, 404, "application/problem+json")
    with MemoRAG(stub.url) as client, pytest.raises(MemoRAGError, match="there is no memory") as caught:
        call(client)
    assert (caught.value.status, caught.value.title, caught.value.problem["near"]) == (404, "Not Found", "y")


def test_an_error_that_is_no_problem_document_is_shown_too(stub: Stub) -> None:
    stub.add("GET /v1/memories/m", b"<h1>Bad Gateway</h1>", 502, "text/html")
    stub.events("POST /v1/memories/m/answer", cut=False)
    with MemoRAG(stub.url) as client, pytest.raises(MemoRAGError, match="Bad Gateway") as caught:
        client.memory("m")
    assert caught.value.status == 502


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no-address"])
def test_no_server_says_how_to_get_one(url: str) -> None:
    with MemoRAG(url) as client, pytest.raises(ServerUnreachable, match=r"memorag up|http://HOST:PORT"):
        list(client.memories())


def test_either_files_or_text() -> None:
    with MemoRAG() as client:
        for arguments in ({}, {"text": "x", "paths": ("a.txt",)}):
            with pytest.raises(ValueError, match="not both"):
                client.memorize(*arguments.pop("paths", ()), **arguments)
        with pytest.raises(FileNotFoundError):
            client.memorize("missing.txt")


# -- documents, archives, several memories -----------------------------------------------------------------


def test_a_document_is_put_and_waited_for(stub: Stub, tmp_path) -> None:
    changed = memory("ready", version="v2", documents=[{"id": "a b"}])
    stub.add("GET /v1/memories/m", memory("ready"))
    stub.add("GET /v1/memories/m", changed)
    stub.add("PUT /v1/memories/m/documents/a%20b", memory("ready", job={"kind": "put", "state": "queued"}), 202)
    stub.events("GET /v1/memories/m/events", ("progress", PROGRESS), ("ready", changed))
    path = tmp_path / "b.txt"
    path.write_text("from a file")
    with MemoRAG(stub.url) as client:
        book = client.memory("m")
        seen: list = []
        assert book.documents.put("a b", text="new", if_match="v1", progress=seen.append) is book
        assert (book.info, [d["id"] for d in book.documents], book.busy) == (changed, ["a b"], False)
        assert seen == [PROGRESS]
        book.documents.put("a b", path=path)
        for wrong in ({}, {"text": "x", "path": path}):
            with pytest.raises(ValueError, match="not both"):
                book.documents.put("a b", **wrong)
    (_, json_headers, json_body), (_, file_headers, file_body) = [r for r in stub.requests if r[0].startswith("PUT")]
    assert json.loads(json_body) == {"text": "new"} and json_headers["If-Match"] == '"v1"'
    assert b'name="file"; filename="b.txt"' in file_body and b"from a file" in file_body
    assert "If-Match" not in file_headers


def test_a_change_that_fails_is_an_error_and_the_memory_stays(stub: Stub) -> None:
    stub.add("GET /v1/memories/m", memory("ready"))
    stub.add("GET /v1/memories/m", kept := memory("ready", failed_change=CANCELLED))
    stub.add("PUT /v1/memories/m/documents/a", memory("ready", job=JOB), 202)
    stub.events("GET /v1/memories/m/events", ("failed", kept))
    with MemoRAG(stub.url) as client:
        book = client.memory("m")
        with pytest.raises(MemoRAGError, match="it was cancelled"):
            book.documents.put("a", text="x")
        assert book.status == "ready" and book.info["version"] == "v1"


def test_a_change_that_failed_before_is_no_error_of_what_is_waited_for_now(stub: Stub) -> None:
    later = memory("ready", failed_change=CANCELLED, job=JOB | {"version": "v3"})
    stub.add("GET /v1/memories/m", memory("ready", failed_change=CANCELLED))
    stub.add("PUT /v1/memories/m/documents/a", later, 202)
    stub.events("GET /v1/memories/m/events", ("ready", memory("ready", version="v3")))
    with MemoRAG(stub.url) as client:
        book = client.memory("m")
        assert book.wait().info["failed_change"] == CANCELLED, "nothing is under way"
        stub.answers["GET /v1/memories/m"] = []
        stub.add("GET /v1/memories/m", memory("ready", version="v3"))
        assert book.documents.put("a", text="x").info["version"] == "v3"


def test_of_two_changes_the_one_that_is_waited_for_counts(stub: Stub) -> None:
    """Its end was not seen, and the next change is under way when the connection is back."""
    stub.add("GET /v1/memories/m", memory("ready"))
    stub.add("GET /v1/memories/m", memory("ready", failed_change=CANCELLED, job=JOB | {"version": "v3"}))
    stub.add("PUT /v1/memories/m/documents/a", memory("ready", job=JOB), 202)
    stub.events("GET /v1/memories/m/events", cut=False)
    with MemoRAG(stub.url) as client:
        book = client.memory("m")
        with pytest.raises(MemoRAGError, match="it was cancelled"):
            book.documents.put("a", text="x")
    assert [route for route, *_ in stub.requests].count("GET /v1/memories/m/events") == 1


def test_documents_are_deleted_and_jobs_cancelled(stub: Stub) -> None:
    stub.add("GET /v1/memories/m", memory("ready"))
    stub.add("DELETE /v1/memories/m/documents/a", memory("ready", version="v2"))
    changed = {"title": "Precondition Failed", "status": 412, "detail": "is at version 'v2'"}
    stub.add("DELETE /v1/memories/m/documents/a", changed, 412, "application/problem+json")
    stub.add("DELETE /v1/memories/m/job", b"", 204)
    with MemoRAG(stub.url) as client:
        book = client.memory("m")
        assert book.documents.delete("a", if_match="v1").info["version"] == "v2"
        with pytest.raises(MemoRAGError, match="is at version 'v2'") as caught:
            book.documents.delete("a", if_match="v1")
        book.cancel()
    assert caught.value.status == 412
    assert all(h.get("If-Match") == '"v1"' for route, h, _ in stub.requests if "documents" in route)
    assert stub.requests[-1][0] == "DELETE /v1/memories/m/job"


def test_an_export_is_whole_or_not_there(stub: Stub, tmp_path) -> None:
    data = bytes(range(256)) * 1000
    stub.add("GET /v1/memories/m", memory("ready"))
    stub.add("GET /v1/memories/m/archive", data, kind="application/x-tar")
    stub.add("GET /v1/memories/m/archive", data, kind="application/x-tar", cut=True)
    stub.add("GET /v1/memories/m/archive", {"status": 500, "title": "x", "detail": "a file is damaged"}, 500)
    with MemoRAG(stub.url) as client:
        book = client.memory("m")
        book.export(tmp_path / "m.tar")
        assert (tmp_path / "m.tar").read_bytes() == data
        with pytest.raises(ServerUnreachable, match="broke off"):
            book.export(tmp_path / "cut.tar")
        with pytest.raises(MemoRAGError, match="a file is damaged"):
            book.export(tmp_path / "cut.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["m.tar"]


def test_an_archive_is_imported_as_it_is(stub: Stub, tmp_path) -> None:
    stub.add("POST /v1/memories", memory("ready"), 202)
    stub.add("POST /v1/memories?id=other", memory("ready", "other"), 202)
    path = tmp_path / "m.tar"
    path.write_bytes(bytes(range(256)) * 1000)
    with MemoRAG(stub.url) as client:
        assert client.import_archive(path).id == "m"
        assert client.import_archive(path, "other").id == "other"
    for _, headers, body in stub.requests:
        assert headers["Content-Type"] == "application/x-tar" and body == path.read_bytes()


def test_several_memories_are_asked_at_once(stub: Stub) -> None:
    stub.add("POST /v1/answer", ANSWER)
    stub.add("GET /v1/memories?tag=log", {"memories": [memory("ready")], "next_cursor": None})
    stub.add("GET /v1/usage", {"tenant": "t", "memories": 3})
    with MemoRAG(stub.url) as client:
        assert client.ask("who?", memories=["a", "b"], tag="log", task="rag", max_tokens=5).text == "twice [1]"
        assert [m.id for m in client.memories(tag="log")] == ["m"]
        assert client.usage()["memories"] == 3
    asked = {"question": "who?", "memories": ["a", "b"], "tag": "log", "task": "rag", "max_tokens": 5}
    assert json.loads(stub.requests[0][2]) == asked


def test_progress_is_lines_where_it_is_asked_for_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    event = {"done_tokens": 10, "total_tokens": 2000, "tokens_per_second": 5.0, "seconds_left": 398.0}
    for progress, said in [(True, "10 of 2,000 tokens, 5 tokens/s, 398 s left\n"), (None, ""), (False, "")]:
        with show_progress("book", progress) as show:
            show(event)
            show(event)  # at once: not said again
        assert capsys.readouterr().err == said
