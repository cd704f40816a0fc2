"""One job from `take` to `publish`: what the workers are asked, what the manifest says, what becomes of failures."""

import asyncio
from dataclasses import replace

import pytest
from ray.exceptions import RayActorError

from cluster.storage.durable import Storage, StoredFile
from memory_worker.catalog.quotas import QuotasConfig
from memory_worker.config import CatalogConfig
from memory_worker.errors import EmptyDocument, JobEnded
from memory_worker.manifest import Manifest, MemoryKey
from memory_worker.messages import Job, MemorizeProgress, MemorizeResult
from memory_worker.storage.store import head_path, passages_path
from retrieval_worker.messages import IndexedDocument, IndexProgress
from serving.router import jobs
from serving.router.jobs import Jobs
from tests.support import manifests as made
from tests.support.stand_in_handles import Handle

SECOND = MemoryKey("acme", "book", "v000002-00000002")


class Catalog:
    """Gives one job, and keeps what is said of it."""

    def __init__(self, job: Job) -> None:
        self.jobs = [job]
        self.progressed: list[tuple[int, int]] = []
        self.published: list[Manifest] = []
        self.failed: list[str] = []
        self.refuse_take = 0
        self.ended: Exception | None = None
        self.done = asyncio.Event()

    async def take(self, runner: str, timeout_s: float, settings) -> Job | None:
        if self.refuse_take:
            self.refuse_take -= 1
            raise RayActorError()
        if not self.jobs:
            await asyncio.Event().wait()
        return self.jobs.pop()

    async def progress(self, key: MemoryKey, runner: str, done: int, total: int) -> None:
        self.progressed.append((done, total))
        if self.ended:
            self.done.set()
            raise self.ended

    async def publish(self, manifest: Manifest) -> None:
        self.published.append(manifest)
        self.done.set()

    async def fail(self, key: MemoryKey, error: str) -> None:
        self.failed.append(error)
        self.done.set()


class Memorizer:
    def __init__(self, base: Manifest) -> None:
        self.base = base
        self.requests = []
        self.errors: list[Exception] = []

    async def memorize(self, request):
        self.requests.append(request)
        yield MemorizeProgress(0, 100)
        if self.errors:
            raise self.errors.pop()
        yield MemorizeProgress(100, 100)
        segments = self.base.documents[0].segments
        head = request.head or replace(self.base.head, path=head_path(request.key))
        of_each = tuple(segments for _ in request.documents)
        yield MemorizeResult("embedded", "f" * 64, made.SHAPE, (1, 2, 3), head, of_each)


class Retriever:
    def __init__(self) -> None:
        self.requests = []

    async def index(self, request):
        self.requests.append(request)
        yield IndexProgress(1, 2)
        yield IndexedDocument(StoredFile(request.path, 5, "a" * 64), 2)


@pytest.fixture
def base(tmp_path) -> Manifest:
    return made.memory(Storage(str(tmp_path)))


async def done(catalog: Catalog, memorizer: Memorizer, retriever: Retriever) -> None:
    """Runs until the catalog is told how the job ended."""
    base = memorizer.base
    settings = CatalogConfig(), QuotasConfig()
    ready = []

    async def on_ready(manifest: Manifest) -> None:
        ready.append(manifest)

    async def manifest_of(key: MemoryKey) -> Manifest:
        assert key.version == base.version
        return base

    mine = Jobs(Handle(catalog), manifest_of, settings, Handle(memorizer), Handle(retriever), on_ready)
    working = asyncio.create_task(mine.run_forever())
    await catalog.done.wait()
    await asyncio.gather(*mine._running)
    working.cancel()
    assert ready == catalog.published


async def test_a_new_memory(base: Manifest) -> None:
    catalog, memorizer, retriever = (
        Catalog(made.job(made.KEY, None, ("x", "y"), title="T", tags=("t",))),
        Memorizer(base),
        Retriever(),
    )
    await done(catalog, memorizer, retriever)
    [manifest] = catalog.published
    assert (manifest.version, manifest.parent, manifest.title, manifest.tags) == (made.KEY.version, None, "T", ("t",))
    assert [d.id for d in manifest.documents] == ["x", "y"] and catalog.failed == []
    assert [d.passages.path for d in manifest.documents] == [passages_path(made.KEY, d) for d in ("x", "y")]
    [request] = memorizer.requests
    assert (request.head, request.ratio, request.language) == (None, 4, "en")


async def test_a_change_encodes_that_document_alone(base: Manifest) -> None:
    catalog, memorizer, retriever = Catalog(made.job(SECOND, base, ("a", "c"))), Memorizer(base), Retriever()
    await done(catalog, memorizer, retriever)
    [manifest], [request] = catalog.published, memorizer.requests
    assert [d.id for d in request.documents] == ["a", "c"] and request.head == base.head
    assert [r.path for r in retriever.requests] == [passages_path(SECOND, d) for d in ("a", "c")]
    assert [d.id for d in manifest.documents] == ["a", "b", "c"], "replaced in its place, new ones behind"
    assert manifest.documents[1] == base.documents[1] and manifest.head == base.head
    assert manifest.documents[0] != base.documents[0] and manifest.parent == base.version


async def test_a_repair_makes_the_head_again(base: Manifest) -> None:
    job = made.job(SECOND, base, ("a", "b"), kind="repair")
    catalog, memorizer = Catalog(job), Memorizer(base)
    await done(catalog, memorizer, Retriever())
    assert memorizer.requests[0].head is None and catalog.published[0].head.path == head_path(SECOND)


async def test_progress_is_what_is_both_encoded_and_indexed(base: Manifest) -> None:
    catalog = Catalog(made.job(made.KEY, None, ("x", "y")))
    await done(catalog, Memorizer(base), Retriever())
    assert all(0 <= before <= total for before, total in catalog.progressed)
    assert max(done for done, _ in catalog.progressed) <= 100 and (0, 100) in catalog.progressed


async def test_a_worker_that_dies_is_replaced(base: Manifest) -> None:
    catalog, memorizer = Catalog(made.job(made.KEY)), Memorizer(base)
    memorizer.errors = [RayActorError(), RayActorError()]
    await done(catalog, memorizer, Retriever())
    assert len(memorizer.requests) == 3 and len(catalog.published) == 1 and catalog.failed == []


async def test_one_that_dies_every_time_fails_the_job(base: Manifest) -> None:
    catalog, memorizer = Catalog(made.job(made.KEY)), Memorizer(base)
    memorizer.errors = [RayActorError() for _ in range(100)]
    await done(catalog, memorizer, Retriever())
    assert len(memorizer.requests) == jobs._ATTEMPTS and catalog.published == []
    assert "not available just now" in catalog.failed[0]


async def test_a_failure_is_said_in_its_own_words(base: Manifest) -> None:
    catalog, memorizer = Catalog(made.job(made.KEY)), Memorizer(base)
    memorizer.errors = [EmptyDocument("x")]
    await done(catalog, memorizer, Retriever())
    assert catalog.failed == [str(EmptyDocument("x"))] and catalog.published == []


async def test_a_cancelled_job_ends_quietly(base: Manifest) -> None:
    catalog = Catalog(made.job(made.KEY))
    catalog.ended = JobEnded("book")
    await done(catalog, Memorizer(base), Retriever())
    assert catalog.failed == [] and catalog.published == []


async def test_a_catalog_that_is_away_is_asked_again(base: Manifest) -> None:
    catalog = Catalog(replace(made.job(made.KEY), state="running"))
    catalog.refuse_take = 1
    await done(catalog, Memorizer(base), Retriever())
    assert len(catalog.published) == 1
