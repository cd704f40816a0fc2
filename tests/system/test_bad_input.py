"""Every bad input is a clear 4xx problem that says what to do, and nothing is lost or left behind."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.server import Server, check_problem
from tests.support.waiting import PATIENCE_S, wait_until

TEXT = [{"text": "A sentence to memorize."}]
BAD_CREATIONS = {
    "empty text": ({"documents": [{"text": ""}]}, 422, "white space"),
    "white space": ({"documents": [{"text": " \n\t　 "}]}, 422, "white space"),
    "no documents": ({"documents": []}, 422, "documents"),
    "wrong type": ({"documents": "text"}, 422, "documents"),
    "text is a number": ({"documents": [{"text": 5}]}, 422, "text"),
    "unknown field": ({"documents": TEXT, "ratoi": 4}, 422, "ratoi"),
    "bad ratio": ({"documents": TEXT, "ratio": 7}, 422, "use one of"),
    "zero ratio": ({"documents": TEXT, "ratio": 0}, 422, "ratio"),
    "id with slash": ({"documents": TEXT, "id": "a/b"}, 422, "id"),
    "id with dots": ({"documents": TEXT, "id": ".."}, 422, "id"),
    "empty id": ({"documents": TEXT, "id": ""}, 422, "id"),
    "long id": ({"documents": TEXT, "id": "a" * 200}, 422, "id"),
    "id with a line break": ({"documents": TEXT, "id": "a\nb"}, 422, "id"),
    "document id with dots": ({"documents": [{"text": "x y", "id": "../../etc"}]}, 422, "id"),
    "twice the same document": ({"documents": [{"text": "x", "id": "a"}, {"text": "y", "id": "a"}]}, 422, "own id"),
    "half a surrogate pair": ('{"documents": [{"text": "\\ud800 x"}]}', 422, "Unicode"),
    "not json": ('{"documents": [', 400, "JSON"),
    "not utf-8": (b'{"documents": [{"text": "\xff\xfe"}]}', 400, "UTF-8"),
    "null": ("null", 422, ""),
    "deep nesting": ("[" * 100_000, 400, "JSON"),
    "a number of 5,000 digits": ('{"documents": [{"text": "x"}], "ratio": ' + "9" * 5000 + "}", 400, "JSON"),
}
BAD_QUESTIONS = {
    "empty": ({"question": ""}, 422, "question"),
    "white space": ({"question": "  \n"}, 422, "empty"),
    "missing": ({}, 422, "question"),
    "wrong type": ({"question": 5}, 422, "question"),
    "unknown field": ({"question": "Who?", "tsak": "rag"}, 422, "tsak"),
    "unknown task": ({"question": "Who?", "task": "magic"}, 422, "task"),
    "unknown language": ({"question": "Who?", "language": "xx"}, 422, "language"),
    "no tokens": ({"question": "Who?", "max_tokens": 0}, 422, "max_tokens"),
    "too many tokens": ({"question": "Who?", "max_tokens": 10**9}, 422, "max_tokens"),
    "longer than the window": ({"question": "why and how " * 2000}, 422, "window"),
    "longer than anything": ({"question": "x" * 1_000_000}, 413, "limits.question_characters"),
    "not json": ("{", 400, ""),
    "not utf-8": (b'{"question": "\xff"}', 400, ""),
    "a number of 5,000 digits": ('{"question": "Who?", "max_tokens": ' + "9" * 5000 + "}", 400, "JSON"),
}


def post(client: httpx.Client, path: str, body) -> httpx.Response:
    if isinstance(body, dict):
        return client.post(path, json=body)
    return client.post(path, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize("case", BAD_CREATIONS)
def test_creation(server: Server, chronicle, case):
    body, status, words = BAD_CREATIONS[case]
    with server.client() as client:
        before = client.get("/v1/memories").json()
        check_problem(post(client, "/v1/memories", body), status, words)
        assert client.get("/v1/memories").json() == before


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_question(server: Server, chronicle, case):
    body, status, words = BAD_QUESTIONS[case]
    with server.client() as client:
        check_problem(post(client, "/v1/memories/chronicle/answer", body), status, words)


def test_unknown_things(server: Server, chronicle):
    ask = {"question": "Who?"}
    with server.client() as client:
        check_problem(client.get("/v1/memories/nothing"), 404, "nothing")
        check_problem(client.delete("/v1/memories/nothing"), 404, "nothing")
        check_problem(client.post("/v1/memories/nothing/answer", json=ask), 404, "nothing")
        check_problem(client.post("/v1/memories/nothing/answer", json=ask | {"stream": True}), 404, "nothing")
        check_problem(client.get("/v1/memories/nothing/events"), 404, "nothing")
        check_problem(client.get("/v1/memories/..%2f..%2fetc/documents/passwd"), 404)
        check_problem(client.get("/v1/memories/chronicle/documents/nothing"), 404, "chronicle.txt")
        check_problem(client.get("/v1/memories/..."), 422, "id")
        check_problem(client.get("/v1/nothing"), 404, "/v1/nothing")
        check_problem(client.put("/v1/memories"), 405)
        check_problem(client.get("/v1/memories?limit=0"), 422, "limit")


def test_head_answers_wherever_get_does(server: Server, chronicle):
    """And of a stream of events, which would end only with the job, nothing but its head."""
    names = {"memory": "chronicle", "document": "chronicle.txt", "model": "memorag/chronicle"}
    with server.client() as client:
        paths = [path for path, methods in client.get("/openapi.json").json()["paths"].items() if "get" in methods]
        assert len(paths) > 8
        for path in ["/", "/docs", *(path.format(**names) for path in paths)]:
            head = client.head(path)
            assert head.status_code == 200 and not head.content, path
        memory = client.get("/v1/memories/chronicle")
        head = client.head("/v1/memories/chronicle")
        assert (head.headers["etag"], head.headers["content-length"]) == (
            memory.headers["etag"],
            str(len(memory.content)),
        )
        assert client.head("/v1/memories/nothing").status_code == client.head("/v1/models/nothing").status_code == 404
        assert client.head("/v1/answer").status_code == 405


def test_content_types(server: Server):
    with server.client() as client:
        check_problem(client.post("/v1/memories", content=b"x", headers={"content-type": "text/csv"}), 415, "multipart")
        check_problem(client.post("/v1/memories", content=b"x"), 415)
        broken = {"content-type": "multipart/form-data; boundary=x"}
        check_problem(client.post("/v1/memories", content=b"not multipart", headers=broken), 400)
        check_problem(client.post("/v1/memories", data={"id": "x"}, files={"id2": (None, "y")}), 422, "no file")
        check_problem(client.post("/v1/memories", content=b"x", headers={"content-type": "multipart/form-data"}), 400)
        check_problem(client.post("/v1/memories", files={"files": ("a.txt", b"\xff\xfe\x00")}), 422, "UTF-8")
        check_problem(client.post("/v1/memories", files={"files": ("a.exe", b"MZ")}), 422, "type")
        check_problem(client.post("/v1/memories", files={"files": ("a.pdf", b"%PDF-1.4 broken")}), 422)


def test_too_large(server: Server):
    with server.client() as client:
        too_large = b"x" * (64 * 2**20 + 1)
        check_problem(client.post("/v1/memories", content=too_large), 413, "bytes")
        in_pieces = (b"x" * 2**20 for _ in range(65))
        check_problem(client.post("/v1/memories", content=in_pieces, headers={"content-type": "application/json"}), 413)
        many = {"documents": [{"text": "x"}] * 1025}
        check_problem(client.post("/v1/memories", json=many), 413, "documents")


def test_while_it_is_being_made_and_twice(server: Server):
    text = "The quick brown fox jumps over the lazy dog near the old mill. " * 4000
    with server.client() as client:
        assert client.post("/v1/memories", json={"id": "slow", "documents": [{"text": text}]}).status_code == 202
        check_problem(client.post("/v1/memories/slow/answer", json={"question": "Who jumps?"}), 409, "still being made")
        check_problem(client.post("/v1/memories", json={"id": "slow", "documents": TEXT}), 409, "exists")
        assert client.get("/v1/memories/slow").json()["status"] == "memorizing"
        assert client.delete("/v1/memories/slow").status_code == 204
        check_problem(client.get("/v1/memories/slow"), 404)


def test_clients_that_hang_up_while_an_answer_is_written(server: Server, chronicle):
    body = {"question": "Tell me everything about every year.", "max_tokens": 4000, "stream": True}

    async def hang_up() -> int:
        """Clients that ask again and again, since one answer is soon whole, and hang up; the requests that ran then."""
        token = asyncio.Event()

        async def ask(client: httpx.AsyncClient) -> None:
            while True:
                async with client.stream("POST", "/v1/memories/chronicle/answer", json=body) as response:
                    async for line in response.aiter_lines():
                        if line == "event: token":
                            token.set()

        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            tasks = [asyncio.create_task(ask(client)) for _ in range(8)]
            await token.wait()
            while not (ran := sum((await client.get("/readyz")).json()["running"].values())):
                assert not any(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return ran

    with ThreadPoolExecutor(1) as thread, server.client() as client:
        assert thread.submit(asyncio.run, hang_up()).result() >= 1
        _nothing_runs_any_more(client)


def test_clients_that_hang_up_while_clues_are_recalled(server: Server, chronicle):
    async def hang_up() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            tasks = [
                asyncio.create_task(client.post("/v1/memories/chronicle/answer", json={"question": f"Who? {i}"}))
                for i in range(8)
            ]
            await asyncio.sleep(0.15)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with ThreadPoolExecutor(1) as thread, server.client() as client:
        thread.submit(asyncio.run, hang_up()).result()
        _nothing_runs_any_more(client)
        assert client.post("/v1/memories/chronicle/answer", json={"question": "Who?"}).status_code == 200


def _nothing_runs_any_more(client: httpx.Client) -> None:
    def running() -> int:
        return sum(client.get("/readyz").json()["running"].values())

    wait_until(lambda: running() == 0)
