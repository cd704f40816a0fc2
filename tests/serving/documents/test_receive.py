"""Requests with documents: what reaches storage and the Router, what is refused, and that nothing is left of that."""

import io
import json
from dataclasses import dataclass, field

import httpx
import pytest
from fastapi import FastAPI, Request

from cluster.storage.durable import Storage
from memory_worker.errors import JobUnderWay
from memory_worker.manifest import JobRecord, MemoryKey
from memory_worker.messages import Reservation
from serving import api
from serving.config import LimitsConfig
from serving.documents.archive import MEDIA_TYPE, pack
from serving.documents.receive import Receiver, if_match
from serving.errors import ProblemError, problem_for
from serving.http.problems import add_error_handlers
from tests.support import manifests as made
from tests.support.stand_in_handles import Handle

OUT = api.MemoryOut(
    id="m", status="memorizing", version="v", kind="beacon", ratio=4, slots=0, tokens=0, passages=0, bytes=0,
    documents=[], created="2026",
)  # fmt: skip


@dataclass
class Router:
    """Says where texts go, notes what it is told; `error` is what beginning the job raises."""

    storage: Storage
    error: Exception | None = None
    reserved: list[tuple] = field(default_factory=list)
    begun: list[tuple] = field(default_factory=list)
    abandoned: list[MemoryKey] = field(default_factory=list)

    async def reserve(self, *asked) -> tuple[MemoryKey, JobRecord]:
        self.reserved.append(asked)
        _, _, title, tags, kind, ratio, _ = asked
        job = JobRecord(
            documents=(), memory_kind=kind or "beacon", ratio=ratio or 4, language="", title=title, tags=tags
        )
        return made.KEY, job

    async def reserve_change(self, *asked) -> tuple[MemoryKey, JobRecord]:
        self.reserved.append(asked)
        return made.KEY, JobRecord(kind="put", documents=(), ratio=4, language="zh")

    async def reserve_import(self, *asked) -> Reservation:
        self.reserved.append(asked)
        return Reservation(made.KEY, None)

    async def begin(self, *told) -> api.MemoryOut:
        return self._begin(told)

    async def adopt(self, *told) -> api.MemoryOut:
        return self._begin(told)

    async def abandon(self, key: MemoryKey) -> None:
        self.abandoned.append(key)
        self.storage.delete_folder(key.path)

    def _begin(self, told: tuple) -> api.MemoryOut:
        if self.error:
            raise self.error
        self.begun.append(told)
        return OUT


@pytest.fixture
def router(tmp_path) -> Router:
    return Router(Storage(str(tmp_path)))


@pytest.fixture
async def http(router: Router):
    app = FastAPI()
    add_error_handlers(app)
    receiver = Receiver(router.storage, LimitsConfig(documents=3))

    @app.post("/memories")
    async def create(request: Request) -> api.MemoryOut:
        return await receiver.create(request, Handle(router), "acme")

    @app.put("/memories/{memory}/{document}")
    async def put(request: Request, memory: str, document: str) -> api.MemoryOut:
        return await receiver.put(request, Handle(router), "acme", memory, document)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


def texts(router: Router) -> dict[str, str]:
    """What lies in storage, by document."""
    return {
        path.rpartition("/")[2].removesuffix(".txt"): router.storage.read_unverified(path).to_pybytes().decode()
        for path in router.storage.files()
    }


async def test_json_documents(http: httpx.AsyncClient, router: Router) -> None:
    documents = [{"id": "a", "text": "The gate is open é."}, {"text": "Two."}]
    body = {"id": "m", "title": "T", "tags": ["x", "y"], "kind": "gist", "ratio": 4, "documents": documents}
    assert (await http.post("/memories", json=body)).status_code == 200
    assert texts(router) == {"a": "The gate is open é.", "doc-2": "Two."}
    assert router.reserved == [("acme", "m", "T", ["x", "y"], "gist", 4, 2)]
    [(key, job)] = router.begun
    assert key == made.KEY and [(d.id, d.characters) for d in job.documents] == [("a", 19), ("doc-2", 4)]
    assert (job.language, job.title, job.memory_kind, job.ratio) == ("en", "T", "gist", 4)
    for document in job.documents:
        router.storage.read(document.source)


async def test_files(http: httpx.AsyncClient, router: Router) -> None:
    files = [("files", ("one.txt", b"One.")), ("files", ("../two.html", b"<p>Two."))]
    response = await http.post(
        "/memories", files=files, data={"id": "m", "tags": ["x", "y"], "kind": "beacon", "ratio": "8"}
    )
    assert response.status_code == 200 and texts(router) == {"one.txt": "One.", "two.html": "Two."}
    assert router.reserved == [("acme", "m", None, ["x", "y"], "beacon", 8, 2)] and router.begun[0][1].ratio == 8


async def test_an_archive(http: httpx.AsyncClient, router: Router, tmp_path) -> None:
    elsewhere = Storage(str(tmp_path / "elsewhere"))
    data = b"".join(pack(elsewhere, manifest := made.memory(elsewhere)))
    headers = {"content-type": MEDIA_TYPE}
    assert (await http.post("/memories?id=other", content=data, headers=headers)).status_code == 200
    assert (await http.post("/memories", content=data, headers=headers)).status_code == 200
    assert [asked[:2] for asked in router.reserved] == [("acme", "other"), ("acme", "book")]
    [(first,), _] = router.begun
    assert [f.digest for f in first.files] == [f.digest for f in manifest.files]
    refused = await http.post("/memories", content=data[: len(data) // 2], headers=headers)
    assert refused.status_code == 422 and "no whole archive" in refused.json()["detail"]


async def test_a_document_in_every_form(http: httpx.AsyncClient, router: Router) -> None:
    forms = [
        {"json": {"text": "as JSON"}},
        {"content": b"as JSON", "headers": {"content-type": "text/plain; charset=utf-8"}},
        {"content": b"as JSON", "headers": {"content-type": "text/markdown"}},
        {"files": {"file": ("x.txt", b"as JSON")}},
        {"files": {"file": ("x.html", b"<p>as JSON</p>")}},
    ]
    for form in forms:
        assert (await http.put("/memories/m/d", **form)).status_code == 200
        assert texts(router) == {"d": "as JSON"}
        _, job = router.begun[-1]
        [document] = job.documents
        assert (document.id, document.characters, job.kind, job.language) == ("d", 7, "put", "zh")


@pytest.mark.parametrize(
    ("form", "status", "words"),
    [
        ({"content": b"x"}, 415, "missing"),
        ({"content": b"x", "headers": {"content-type": "text/csv"}}, 415, "multipart/form-data"),
        ({"content": b"\xff", "headers": {"content-type": "text/plain"}}, 422, "UTF-8"),
        ({"content": b" ", "headers": {"content-type": "text/plain"}}, 422, "white space"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "JSON"),
        ({"content": b'{"text": 1}', "headers": {"content-type": "application/json"}}, 422, "text"),
        ({"json": {"text": "x", "id": "y"}}, 422, "id"),
        ({"files": [("file", ("a.txt", b"x")), ("file", ("b.txt", b"x"))]}, 413, "Too many files"),
        ({"data": {"file": "x"}, "files": {"a": (None, b"x")}}, 422, "0 files"),
        ({"files": {"file": ("a.exe", b"MZ")}}, 422, "no supported type"),
        ({"files": {"file": ("a.docx", b"PK")}}, 422, "could not be read"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"json": {"text": "x"}, "headers": {"if-match": "v1"}}, 400, "If-Match"),
    ],
)
async def test_a_document_that_is_refused_leaves_nothing(http, router: Router, form, status: int, words: str) -> None:
    response = await http.put("/memories/m/d", **form)
    assert response.status_code == status and words in response.json()["detail"], response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert texts(router) == {} and router.begun == [] and len(router.abandoned) == len(router.reserved)


async def test_one_refused_document_of_several_takes_the_others_with_it(http, router: Router) -> None:
    documents = [{"text": "good"}, {"text": " "}]
    assert (await http.post("/memories", json={"documents": documents})).status_code == 422
    files = [("files", ("a.txt", b"good")), ("files", ("b.txt", b"\xff"))]
    assert (await http.post("/memories", files=files)).status_code == 422
    assert texts(router) == {} and router.begun == [] and router.abandoned == [made.KEY] * 2


async def test_who_comes_second_leaves_nothing(http, router: Router) -> None:
    router.error = problem_for(JobUnderWay("m"))
    assert (await http.put("/memories/m/d", json={"text": "x"})).status_code == 412
    assert texts(router) == {} and router.abandoned == [made.KEY]


async def test_too_many_files(http: httpx.AsyncClient, router: Router) -> None:
    response = await http.post("/memories", files=[("files", (f"{i}.txt", io.BytesIO(b"x"))) for i in range(4)])
    assert response.status_code == 413 and "Too many files" in response.json()["detail"] and router.reserved == []


@pytest.mark.parametrize("id", ["../x", "a/b", "", ".", "a\0", "a\u202eb", "e\u0301", "\u0430", "x" * 129])
async def test_ids_of_documents_are_checked_before_anything_is_reserved(http, router: Router, id: str) -> None:
    response = await http.post("/memories", json={"documents": [{"id": id, "text": "x"}]})
    assert response.status_code == 422 and router.reserved == []


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ([], None),
        (["*"], None),
        (['"v1"'], "v1"),
        ([' "v1" '], "v1"),
        (["v1"], 400),
        (['W/"v1"'], 400),
        (['"v1", "v2"'], 400),
        (['"v1"', '"v2"'], 400),
        (['""'], 400),
        (['"'], 400),
        (["x" * 5000], 400),
    ],
)
def test_if_match(headers: list[str], version) -> None:
    raw = [(b"if-match", value.encode()) for value in headers]
    request = Request({"type": "http", "method": "PUT", "path": "/", "headers": raw})
    if version == 400:
        with pytest.raises(ProblemError, match="send one ETag") as refused:
            if_match(request)
        assert refused.value.status == 400 and len(json.dumps(refused.value.body())) < 500
    else:
        assert if_match(request) == version
