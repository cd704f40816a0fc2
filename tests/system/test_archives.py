"""A memory leaves as one file and comes back the same, or not at all."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from examples.chronicles import document
from memory_worker.storage.store import open_manifest, seal
from tests.support.documents import check_exact
from tests.support.server import Server, check_problem, memorize

TAR = {"content-type": "application/x-tar"}
CHRONICLES = {name: document(seed, 40, "test") for seed, name in enumerate(("one", "two"))}  # no clue is a toss-up
TEXTS = {name: chronicle["text"] for name, chronicle in CHRONICLES.items()}


@pytest.fixture(scope="module")
def archive(server: Server) -> Iterator[bytes]:
    """Of the memory `shipped`."""
    memorize(server, [{"id": name, "text": words} for name, words in TEXTS.items()], id="shipped", tags=["sea"])
    with server.client() as client:
        response = client.get("/v1/memories/shipped/archive")
        assert response.status_code == 200 and response.headers["content-type"] == "application/x-tar"
        assert response.headers["content-disposition"] == 'attachment; filename="shipped.tar"'
        yield response.content
        client.delete("/v1/memories/shipped")


def bring(client: httpx.Client, data: bytes, id: str) -> httpx.Response:
    return client.post("/v1/memories", params={"id": id}, content=data, headers=TAR)


def test_what_comes_back_answers_the_same(server: Server, archive: bytes):
    question = {"question": CHRONICLES["two"]["questions"][0]["question"], "max_tokens": 8}
    with server.client() as client:
        made = bring(client, archive, "arrived")
        assert made.status_code == 202 and made.json()["status"] == "ready"
        was = client.get("/v1/memories/shipped").json()
        same = ("documents", "tags", "ratio", "slots", "tokens", "passages", "bytes")
        assert {key: made.json()[key] for key in same} == {key: was[key] for key in same}
        answers = [client.post(f"/v1/memories/{id}/answer", json=question).json() for id in ("shipped", "arrived")]
        for id, answer in zip(("shipped", "arrived"), answers, strict=True):
            assert answer["degraded"] == ["embedded-model"] and answer["passages"] and answer["clues"]
            check_exact(answer["passages"] + answer["evidence"], {id: TEXTS})
        assert without_memory(answers[0]["passages"]) == without_memory(answers[1]["passages"])
        assert in_any_order(answers[0]["clues"]) == in_any_order(answers[1]["clues"]), "the slots are the same"
        check_problem(bring(client, archive, "arrived"), 409, "exists already")
        put = client.put("/v1/memories/arrived/documents/three", json={"text": "A third text."})
        assert put.status_code == 202, "an imported memory can be changed"
        assert client.delete("/v1/memories/arrived").status_code == 204


def in_any_order(clues: list[dict]) -> list[tuple[str, str]]:
    """Kinds are recalled at once: which is written first, load decides."""
    return sorted((clue["kind"], clue["text"]) for clue in clues)


def without_memory(passages: list[dict]) -> list[dict]:
    return [{key: value for key, value in passage.items() if key != "memory"} for passage in passages]


def test_the_command_line_and_its_own_id(server: Server, archive: bytes, tmp_path: Path):
    file = tmp_path / "shipped.tar"
    server.memorag("export", "shipped", str(file))
    assert tarfile.is_tarfile(file) and file.stat().st_size == len(archive)
    again = server.memorag("import", str(file), check=False)
    assert again.returncode == 1 and "exists already" in again.stderr
    server.memorag("import", str(file), "--id", "by-hand")
    with server.client() as client:
        assert client.delete("/v1/memories/by-hand").status_code == 204


def resealed(archive: bytes, **changes) -> bytes:
    """The archive with another manifest, sealed as if it were ours."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            content = old.extractfile(member).read()
            if member.name == "manifest.json":
                content = seal(open_manifest(content, "manifest.json").model_copy(update=changes))
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return out.getvalue()


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def some_content(archive: bytes) -> int:
    """Where a byte of the last file's content lies."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getmembers()[-1].offset_data + 1


BROKEN = {
    "empty": (lambda data: b"", 422, "no whole archive"),
    "cut in the manifest": (lambda data: data[:900], 422, "no whole archive"),
    "cut in the middle": (lambda data: data[: len(data) // 2], 422, "no whole archive"),
    "cut at the end": (lambda data: data[:-11_000], 422, "no whole archive"),
    "flipped in the manifest": (lambda data: flipped(data, 900), 422, "no whole archive"),
    "flipped in a file": (lambda data: flipped(data, some_content(data)), 422, "does not match its SHA-256"),
    "of another model": (lambda data: resealed(data, fingerprint="0" * 64), 409, "was encoded by the model"),
    "of another format": (lambda data: resealed(data, format=99), 422, "has format version 99"),
    "without documents": (lambda data: resealed(data, documents=()), 422, "names a document twice, or none"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_archive_is_refused_and_leaves_nothing(server: Server, archive: bytes, how: str):
    change, status, words = BROKEN[how]
    with server.client() as client:
        check_problem(bring(client, change(archive), "broken"), status, words)
        check_problem(client.get("/v1/memories/broken"), 404, "broken")
        left = [path for path in (server.storage / "memories" / "default" / "broken").rglob("*") if path.is_file()]
        assert left == []


@pytest.mark.parametrize("id", ["..", "../x", "a/b", "", "x" * 200, "\u202e", "a\0b"])
def test_an_import_cannot_choose_a_path(server: Server, archive: bytes, id: str):
    with server.client() as client:
        check_problem(bring(client, archive, id), 422, "id")
