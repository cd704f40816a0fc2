"""The catalog gives a name to one job only, tells who waits, and may be killed at any moment."""

import asyncio
import os
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from benchmarks.support.stored_memories import store_memory
from cluster.storage.durable import StorageFull, StoredFile
from memory_worker.catalog.actor import catalog
from memory_worker.catalog.catalog import Catalog
from memory_worker.catalog.quotas import Quota, QuotasConfig
from memory_worker.config import CatalogConfig
from memory_worker.errors import (
    DocumentNotFound,
    InvalidId,
    JobEnded,
    JobUnderWay,
    LastDocument,
    MemoryExists,
    MemoryNotFound,
    MemoryNotReady,
    NoJob,
    QueueFull,
    QuotaExceeded,
    VersionChanged,
)
from memory_worker.manifest import Document, JobRecord, Manifest, MemoryKey
from memory_worker.messages import FailedChange, Job, MemoryRecord, Reservation
from memory_worker.storage.store import MemoryStore, new_request, source_path
from tests.support.local_actor import LocalActor
from tests.support.waiting import PATIENCE_S, wait_until


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(str(tmp_path))


@pytest.fixture
def started(store: MemoryStore) -> Iterator[Any]:
    """Starts the catalog of this test with these settings."""
    actors: list[LocalActor] = []

    def start(quotas: QuotasConfig | None = None, **settings: Any) -> LocalActor:
        actors.append(LocalActor(Catalog, store.storage.root, CatalogConfig(**settings), quotas))
        return actors[-1]

    yield start
    for actor in actors:
        actor.end()


@pytest.fixture
def memories(started: Any) -> Any:
    return started(running_jobs=100)


@pytest.fixture
def in_a_process(local_ray: None, store: MemoryStore) -> Iterator[Any]:
    """The catalog as an actor of Ray, for tests of kills in the middle of its work."""
    actor = catalog(store.storage.root, f"test-{uuid.uuid4().hex}", CatalogConfig(running_jobs=100))
    yield actor
    ray.kill(actor)


def job(*documents: str, title: str | None = None, base: str | None = None) -> JobRecord:
    source = StoredFile(path="acme/book/v000001-00000000/source/one.txt", size=4, digest="0" * 64)
    return JobRecord(
        kind="put" if base else "create",
        base=base,
        documents=tuple(Document(id=d, characters=4, source=source) for d in documents or ("one",)),
        ratio=4,
        language="en",
        title=title,
    )


async def begin(memories: Any, memory: str, record: JobRecord | None = None, tenant: str = "acme") -> MemoryKey:
    reserved = await memories.reserve.remote(tenant, memory, create=True)
    return (await memories.begin.remote(reserved.key, record or job())).key


async def taken(memories: Any, runner: str = "runner") -> Job:
    found = await memories.take.remote(runner, PATIENCE_S)
    assert found is not None
    return found


async def make(memories: Any, store: MemoryStore, memory: str, tenant: str = "acme") -> MemoryKey:
    key = await begin(memories, memory, tenant=tenant)
    await memories.publish.remote(store_memory(store, key, {"one": (3, 1)}, publish=False))
    return key


async def change(memories: Any, store: MemoryStore, memory: str, document: str, **reserve: Any) -> Manifest:
    """Adds or replaces a document, as a job does."""
    reserved = await memories.reserve.remote("acme", memory, create=False, **reserve)
    base = store.read_manifest(reserved.base)
    await memories.begin.remote(reserved.key, job(document, base=base.version))
    new = store_memory(store, reserved.key, {document: (7, 2)}, publish=False)
    documents = {d.id: d for d in (*base.documents, *new.documents)}
    manifest = base.model_copy(
        update={"version": new.version, "parent": base.version, "documents": tuple(documents.values())}
    )
    await memories.publish.remote(manifest)
    return manifest


async def test_from_begin_to_ready(memories: Any, store: MemoryStore) -> None:
    work = job("one", title="A Book")
    key = await begin(memories, "book", work)
    record = await memories.get.remote("acme", "book")
    assert (record.status, record.key, record.created) == ("memorizing", key, work.created)
    assert (record.job.record, record.job.key, record.job.state) == (work, key, "queued")
    with pytest.raises(MemoryNotReady, match="still being made"):
        await memories.read.remote("acme", "book")
    assert (await taken(memories)).record == work
    await memories.progress.remote(key, "runner", 30, 100)
    found = (await memories.get.remote("acme", "book")).job
    assert (found.state, found.done_tokens, found.total_tokens) == ("running", 30, 100)
    manifest = store_memory(store, key, {"one": (3, 1)}, publish=False)
    await memories.publish.remote(manifest)
    await memories.publish.remote(manifest)
    record = await memories.get.remote("acme", "book")
    assert (record.status, record.version, record.job) == ("ready", key.version, None)
    assert (await memories.read.remote("acme", "book")).key == key and store.read_manifest(key) == manifest
    assert await memories.take.remote("runner", 0) is None


async def test_a_change_is_a_new_version_and_readers_see_the_old_one_until_then(
    memories: Any, store: MemoryStore
) -> None:
    first = await make(memories, store, "book")
    reserved = await memories.reserve.remote("acme", "book", create=False, if_match=first.version)
    assert reserved.base == first and reserved.key.version > first.version
    await memories.begin.remote(reserved.key, job("two", base=first.version))
    record = await memories.get.remote("acme", "book")
    assert (record.status, record.version, record.job.key) == ("ready", first.version, reserved.key)
    assert (await taken(memories)).base == first
    assert (await memories.read.remote("acme", "book")).key == first
    memories.die()
    assert (await memories.get.remote("acme", "book")).job.key == reserved.key
    await memories.fail.remote(reserved.key, "no space")
    for _ in range(2):  # the second time as storage has it
        record = await memories.get.remote("acme", "book")
        assert (record.status, record.version, record.error) == ("ready", first.version, None)
        assert record.failed_change == FailedChange(reserved.key, "put", "no space")
        memories.die()
    manifest = await change(memories, store, "book", "two")
    record = await memories.get.remote("acme", "book")
    assert (record.version, record.failed_change) == (manifest.version, None)
    assert [d.id for d in manifest.documents] == ["one", "two"]
    assert manifest.documents[0].source.path.startswith(first.path), "the unchanged document is referenced"


async def test_of_two_writers_one_wins(memories: Any, store: MemoryStore) -> None:
    first = await make(memories, store, "book")
    both = [await memories.reserve.remote("acme", "book", create=False, if_match=first.version) for _ in range(2)]
    begun = await asyncio.gather(
        *(memories.begin.remote(r.key, job("two", base=first.version)) for r in both), return_exceptions=True
    )
    assert sorted((isinstance(b, MemoryRecord), isinstance(b, JobUnderWay)) for b in begun) == [
        (False, True),
        (True, False),
    ]
    winner = both[[isinstance(b, MemoryRecord) for b in begun].index(True)]
    for refused in (
        memories.reserve.remote("acme", "book", create=False),
        memories.remove_document.remote("acme", "book", "one"),
    ):
        with pytest.raises(JobUnderWay):
            await refused
    base = store.read_manifest(first)
    await memories.publish.remote(base.model_copy(update={"version": winner.key.version}))
    with pytest.raises(VersionChanged):
        await memories.begin.remote(both[0].key if winner is both[1] else both[1].key, job("x", base=first.version))
    with pytest.raises(VersionChanged, match=winner.key.version):
        await memories.reserve.remote("acme", "book", create=False, if_match=first.version)


async def test_a_document_is_deleted_at_once(memories: Any, store: MemoryStore) -> None:
    await make(memories, store, "book")
    manifest = await change(memories, store, "book", "two")
    with pytest.raises(DocumentNotFound, match="it has one, two"):
        await memories.remove_document.remote("acme", "book", "three")
    with pytest.raises(VersionChanged):
        await memories.remove_document.remote("acme", "book", "one", "v000001-00000000")
    record = await memories.remove_document.remote("acme", "book", "one", manifest.version)
    assert [d.id for d in store.read_manifest(record.key).documents] == ["two"]
    assert (await memories.read.remote("acme", "book")).key == record.key
    with pytest.raises(LastDocument, match="delete the memory instead"):
        await memories.remove_document.remote("acme", "book", "two")
    memories.die()
    assert (await memories.read.remote("acme", "book")).key == record.key


async def test_a_cancelled_job(memories: Any, store: MemoryStore) -> None:
    key = await begin(memories, "new")
    await memories.cancel.remote(key)
    record = await memories.get.remote("acme", "new")
    assert (record.status, record.error, record.job) == ("failed", "it was cancelled", None)
    with pytest.raises(JobEnded):
        await memories.progress.remote(key, "runner", 1, 2)
    first = await make(memories, store, "book")
    reserved = await memories.reserve.remote("acme", "book", create=False)
    await memories.begin.remote(reserved.key, job("two", base=first.version))
    await memories.cancel.remote(reserved.key)
    for _ in range(2):
        record = await memories.get.remote("acme", "book")
        assert (record.status, record.version, record.job) == ("ready", first.version, None)
        await memories.cancel.remote(reserved.key)  # as Ray repeats a call whose actor died before its reply
        with pytest.raises(NoJob):
            await memories.cancel.remote(first)
        memories.die()


async def test_a_job_whose_runner_is_silent_is_given_to_another(started: Any, store: MemoryStore) -> None:
    memories = started(lease_s=2.0)
    key = await begin(memories, "book")
    assert (await taken(memories, "first")).key == key
    waiting = memories.take.remote("second", PATIENCE_S)
    await memories.progress.remote(key, "first", 1, 10)
    assert (await waiting).key == key
    with pytest.raises(JobEnded):
        await memories.progress.remote(key, "first", 2, 10)
    await memories.progress.remote(key, "second", 2, 10)
    memories.die()
    await memories.progress.remote(key, "second", 3, 10)  # goes on as if nothing had happened
    assert await memories.take.remote("third", 0.1) is None
    assert (await taken(memories, "third")).key == key


async def test_limits_of_queue_and_tenants(started: Any, store: MemoryStore) -> None:
    quotas = QuotasConfig(default=Quota(memories=3, jobs=2), tenants={"tiny": Quota(tokens=5), "small": Quota(bytes=1)})
    memories = started(quotas, waiting_jobs=3)
    for name in ("one", "two"):
        await begin(memories, name)
    with pytest.raises(QuotaExceeded, match="3 jobs at a time, and your quota is 2"):
        await begin(memories, "three")
    tiny = await begin(memories, "book", tenant="tiny")
    with pytest.raises(QueueFull):
        await begin(memories, "book", tenant="small")
    assert {(await taken(memories)).key.memory for _ in range(3)} == {"one", "two", "book"}
    with pytest.raises(QuotaExceeded, match="6 tokens, and your quota is 5"):
        await memories.progress.remote(tiny, "runner", 0, 6)
    small = await begin(memories, "book", tenant="small")
    with pytest.raises(QuotaExceeded, match="bytes"):
        await memories.publish.remote(store_memory(store, small, {"one": (3, 1)}, publish=False))
    for name in ("one", "two"):
        await memories.fail.remote((await memories.get.remote("acme", name)).key, "x")
    await begin(memories, "three")
    with pytest.raises(QuotaExceeded, match="4 memories"):
        await begin(memories, "four")
    usage = await memories.usage.remote("acme")
    assert (usage.memories, usage.jobs) == (3, 1)
    # A redeployment brings other limits with its runners.
    await memories.take.remote("runner", 0, (CatalogConfig(), QuotasConfig()))
    await begin(memories, "four")


@pytest.mark.parametrize(("tenant", "allowed"), [("acme", 3), ("few", 2)])
async def test_of_many_uploads_at_once_as_many_begin_as_the_quota_allows(
    started: Any, store: MemoryStore, tenant: str, allowed: int
) -> None:
    quotas = QuotasConfig(default=Quota(memories=3), tenants={"few": Quota(jobs=2)})
    memories = started(quotas, running_jobs=100)

    async def reserve(names: list[str]) -> list[Reservation]:
        tries = [memories.reserve.remote(tenant, name, create=True) for name in names]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert all(isinstance(result, Reservation | QuotaExceeded) for result in results)
        return [result for result in results if isinstance(result, Reservation)]

    reserved = await reserve([f"book-{n}" for n in range(16)])
    assert len(reserved) == allowed
    await memories.abandon.remote(reserved.pop().key)
    reserved += await reserve([f"again-{n}" for n in range(16)])
    assert len(reserved) == allowed, "what is given up counts no more"
    memories.die()  # it knows of no reservation now
    reserved += await reserve([f"more-{n}" for n in range(16)])
    assert len(reserved) == 2 * allowed
    begun = await asyncio.gather(*(memories.begin.remote(r.key, job()) for r in reserved), return_exceptions=True)
    assert sum(isinstance(result, MemoryRecord) for result in begun) == allowed
    assert sum(isinstance(result, QuotaExceeded) for result in begun) == allowed
    assert len([path for path in store.storage.files(tenant) if path.endswith("job.json")]) == allowed


async def test_of_many_versions_published_at_once_as_many_are_as_the_quota_has_bytes_for(
    started: Any, store: MemoryStore
) -> None:
    key = MemoryKey("acme", "size", "v000001-00000000")
    size = store_memory(store, key, {"one": (3, 1)}, publish=False).bytes
    store.discard(key)
    memories = started(QuotasConfig(default=Quota(bytes=3 * size)), running_jobs=100)
    keys = [await begin(memories, f"book-{n}") for n in range(8)]
    manifests = [store_memory(store, key, {"one": (3, 1)}, publish=False) for key in keys]
    results = await asyncio.gather(*map(memories.publish.remote, manifests), return_exceptions=True)
    assert sum(isinstance(result, MemoryRecord) for result in results) == 3
    assert sum(isinstance(result, QuotaExceeded) for result in results) == 5
    assert (await memories.usage.remote("acme")).bytes == 3 * size


async def test_of_many_that_begin_at_once_the_queue_takes_what_it_holds_and_nothing_is_left_of_others(
    started: Any, store: MemoryStore
) -> None:
    memories = started(waiting_jobs=2)
    reserved = [await memories.reserve.remote(f"tenant-{n}", "book", create=True) for n in range(8)]
    begun = await asyncio.gather(*(memories.begin.remote(r.key, job()) for r in reserved), return_exceptions=True)
    assert sum(isinstance(result, QueueFull) for result in begun) == 6
    assert len([path for path in store.storage.files("") if path.endswith("job.json")]) == 2
    memories.die()
    assert (await memories.totals.remote()).running_jobs == 2


async def test_old_versions_go_after_a_grace_and_never_under_a_reader(started: Any, store: MemoryStore) -> None:
    memories = started(grace_s=4.0)
    assert await memories.take.remote("runner", 0) is None  # whoever does jobs starts the collection too
    first = await make(memories, store, "book")
    second = await change(memories, store, "book", "two")
    third = store.read_manifest((await memories.remove_document.remote("acme", "book", "one")).key)
    manifest = store.read_manifest(first)
    for _ in range(18):  # someone reads the first version for longer than the grace
        await memories.hold.remote(first)
        for file in manifest.files:
            store.storage.read(file)
        await asyncio.sleep(0.25)
    await asyncio.to_thread(wait_until, lambda: store.versions("acme", "book") == [third.version])
    files = partial(store.storage.files, "acme")  # deleted text goes
    await asyncio.to_thread(wait_until, lambda: not any("one" in path.rpartition("/")[2] for path in files()))
    assert (await memories.read.remote("acme", "book")).key.version == third.version
    for file in third.files:
        store.storage.read(file)
    assert second.version in store.all_versions("acme", "book"), "its files of the second document are still used"


async def test_a_damaged_document_is_made_again(memories: Any, store: MemoryStore) -> None:
    key = await make(memories, store, "book")
    entry = store.read_manifest(key).documents[0]
    assert not await memories.repair.remote(key, entry.source.path), "what it would be made of is the damaged file"
    assert not await memories.repair.remote(key, "acme/book/elsewhere")
    assert await memories.repair.remote(key, entry.passages.path)
    assert await memories.repair.remote(key, entry.segments[0].files[0].path), "it is under way"
    work = await taken(memories)
    assert (work.record.kind, work.record.documents[0].source) == ("repair", entry.source)
    assert work.base == key and work.key.version != key.version


async def test_damage_that_cannot_be_mended_now_is_told_and_leaves_nothing(
    started: Any, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = started(waiting_jobs=1, running_jobs=1)
    key = await make(memories, store, "book")
    path = store.read_manifest(key).documents[0].passages.path
    other = await begin(memories, "other")
    assert not await memories.repair.remote(key, path), "the queue is full"
    assert store.all_versions("acme", "book") == [key.version]
    await memories.fail.remote(other, "x")
    full = Catalog(store.storage.root)  # in this process, where storage can be made to refuse

    def refuse(*_: object) -> None:
        raise StorageFull(store.storage.root)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "begin", refuse)
        assert not await full.repair(key, path)
        with pytest.raises(StorageFull):
            await full.begin((await full.reserve("acme", "new", create=True)).key, job())
    assert (await full.get("acme", "book")).job is None and (await full.totals()).waiting_jobs == 0
    assert await full.take("runner", 0) is None
    assert await memories.repair.remote(key, path) and (await memories.get.remote("acme", "book")).job


async def test_a_manifest_that_storage_lost_is_written_again(memories: Any, store: MemoryStore, tmp_path: Path) -> None:
    first = await make(memories, store, "book")
    manifest = await change(memories, store, "book", "two")
    key = MemoryKey("acme", "book", manifest.version)
    for name in ("manifest.json", "manifest.backup.json"):
        (tmp_path / key.path / name).write_bytes(b"{}")
    assert await memories.restore_manifest.remote(key) == manifest == store.read_manifest(key)
    with pytest.raises(MemoryNotFound):
        await memories.restore_manifest.remote(first)


@pytest.mark.parametrize("call", ["delete", "remove_document", "cancel"])
async def test_killed_between_effect_and_reply_the_call_that_ray_repeats_finds_it_done(
    in_a_process: Any, store: MemoryStore, call: str
) -> None:
    memories = in_a_process
    await make(memories, store, "book")
    await change(memories, store, "book", "two")
    reserved = await memories.reserve.remote("acme", "book", create=False)
    if call == "cancel":
        await memories.begin.remote(reserved.key, job("three", base=reserved.base.version))

    def die_after(actor: Any, effect: str) -> None:
        """Until the actor is started again."""
        whole = getattr(actor._store, effect)

        def dying(*arguments: Any) -> None:
            whole(*arguments)
            os._exit(1)

        setattr(actor._store, effect, dying)

    effect = {"delete": "delete", "remove_document": "publish", "cancel": "fail"}[call]
    before = await memories.__ray_call__.remote(lambda _: os.getpid())
    await memories.__ray_call__.remote(die_after, effect)
    request = new_request()
    if call == "delete":
        await memories.delete.remote("acme", "book", request)
        again = await make(memories, store, "book")
        await memories.delete.remote("acme", "book", request)
        assert (await memories.get.remote("acme", "book")).key == again, "another memory, which nobody deleted"
        with pytest.raises(MemoryNotFound):
            await memories.delete.remote("acme", "other", new_request())
    elif call == "remove_document":
        record = await memories.remove_document.remote("acme", "book", "one", None, request)
        assert [document.id for document in store.read_manifest(record.key).documents] == ["two"]
        repeated = await memories.remove_document.remote("acme", "book", "one", reserved.base.version, request)
        assert repeated.key == record.key
        with pytest.raises(DocumentNotFound):
            await memories.remove_document.remote("acme", "book", "one", None, new_request())
    else:
        await memories.cancel.remote(reserved.key)
        record = await memories.get.remote("acme", "book")
        assert (record.status, record.job, record.failed_change.error) == ("ready", None, "it was cancelled")
    assert await memories.__ray_call__.remote(lambda _: os.getpid()) != before, "it was killed"


async def test_memories_by_tag(memories: Any, store: MemoryStore) -> None:
    for name, tags in (("a", ("red",)), ("b", ("red", "blue")), ("c", ())):
        key = await begin(memories, name)
        manifest = store_memory(store, key, {"one": (3, 1)}, publish=False)
        await memories.publish.remote(manifest.model_copy(update={"tags": tags}))
    assert [m.key.memory for m in await memories.read_many.remote("acme", ["c"], "red")] == ["c", "a", "b"]
    assert [m.key.memory for m in await memories.read_many.remote("acme", ["a", "a"], "blue")] == ["a", "b"]
    assert await memories.read_many.remote("other", [], "red") == []
    assert [r.memory for r in (await memories.list.remote("acme", None, 10, "red"))[0]] == ["a", "b"]


async def test_of_many_that_begin_at_once_one_wins(memories: Any, store: MemoryStore) -> None:
    tries = await asyncio.gather(*(begin(memories, "book") for _ in range(32)), return_exceptions=True)
    keys = [t for t in tries if isinstance(t, MemoryKey)]
    assert len(keys) == 1 and store.all_versions("acme", "book") == [keys[0].version]
    assert all(isinstance(t, MemoryExists) for t in tries if t is not keys[0])
    assert await begin(memories, "book", tenant="other-tenant")


async def test_the_same_job_again_is_the_same_record(memories: Any, store: MemoryStore) -> None:
    work = job()
    key = await begin(memories, "book", work)
    assert (await memories.begin.remote(key, work)).key == key
    memories.die()
    assert (await memories.begin.remote(key, work)).key == key
    await memories.publish.remote(store_memory(store, key, {"one": (3, 1)}, publish=False))
    with pytest.raises(MemoryExists, match="choose another id"):
        await begin(memories, "book")


async def test_what_is_abandoned_leaves_nothing(memories: Any, store: MemoryStore) -> None:
    reserved = await memories.reserve.remote("acme", "book", create=True)
    store.storage.write(source_path(reserved.key, "one"), b"text")
    await memories.abandon.remote(reserved.key)
    assert store.storage.files("") == []
    key = await make(memories, store, "book")
    await memories.abandon.remote(key)  # late, after it became a job: nothing happens
    assert (await memories.read.remote("acme", "book")).key.version == key.version


async def test_a_failed_memory_says_why_and_can_be_made_again(memories: Any, store: MemoryStore) -> None:
    key = await begin(memories, "book")
    await memories.fail.remote(key, "no space left on device")
    with pytest.raises(JobEnded):
        await memories.fail.remote(key, "again")
    for _ in range(2):  # the second time as storage has it
        record = await memories.get.remote("acme", "book")
        assert (record.status, record.error, record.key) == ("failed", "no space left on device", key)
        with pytest.raises(MemoryNotReady, match="no space left on device"):
            await memories.read.remote("acme", "book")
        assert await memories.take.remote("runner", 0) is None
        memories.die()
    again = await begin(memories, "book")
    assert again.version != key.version
    assert store.all_versions("acme", "book") == [again.version]
    with pytest.raises(JobEnded):
        await memories.progress.remote(key, "runner", 1, 2)
    await memories.publish.remote(store_memory(store, again, {"one": (3, 1)}, publish=False))
    assert (await memories.get.remote("acme", "book")).status == "ready"


async def test_killed_at_any_moment_it_knows_what_storage_knows(memories: Any, store: MemoryStore) -> None:
    ready = [await make(memories, store, f"book-{n}") for n in range(5)]
    failed, running = [await begin(memories, name) for name in ("failed", "running")]
    await memories.fail.remote(failed, "broken")
    before, _ = await memories.list.remote("acme")
    memories.die()
    after, _ = await memories.list.remote("acme")

    def known(records: list[MemoryRecord]) -> list[Any]:
        return [(r.memory, r.version, r.status, r.created, r.job and r.job.record, r.error) for r in records]

    assert known(after) == known(before) and len(after) == 7
    assert {r.revision for r in before}.isdisjoint(r.revision for r in after)
    await memories.progress.remote(running, "runner", 1, 2)  # the runner goes on as if nothing had happened
    assert (await memories.read.remote("acme", "book-3")).key.version == ready[3].version


async def test_kills_while_jobs_are_made_lose_and_double_nothing(in_a_process: Any, store: MemoryStore) -> None:
    memories = in_a_process

    async def killer() -> None:
        for _ in range(3):
            await asyncio.sleep(0.3)
            ray.kill(memories, no_restart=False)

    killing = asyncio.create_task(killer())
    names = [f"book-{n}" for n in range(24)]
    keys = await asyncio.gather(*(make(memories, store, name) for name in names))
    await killing
    records, _ = await memories.list.remote("acme")
    assert [r.memory for r in records] == sorted(names) and {r.status for r in records} == {"ready"}
    assert {r.key for r in records} == set(keys)
    assert all(store.all_versions("acme", key.memory) == [key.version] for key in keys)


async def test_waiting_ends_with_the_next_change(memories: Any, store: MemoryStore) -> None:
    key = await begin(memories, "book")
    await taken(memories)
    seen = (await memories.get.remote("acme", "book")).revision
    assert (await memories.wait.remote("acme", "book", seen, 0.05)).revision == seen
    waiting = [memories.wait.remote("acme", "book", seen, PATIENCE_S) for _ in range(1500)]
    await asyncio.sleep(0.2)
    await memories.progress.remote(key, "runner", 10, 100)  # not held up by those who wait
    records = await asyncio.gather(*waiting)
    assert {r.job.done_tokens for r in records} == {10} and records[0].revision != seen
    waiter = memories.wait.remote("acme", "book", records[0].revision, PATIENCE_S)
    memories.die()
    assert (await waiter).revision != records[0].revision
    waiter = memories.wait.remote("acme", "book", (await memories.get.remote("acme", "book")).revision, PATIENCE_S)
    await memories.delete.remote("acme", "book")
    with pytest.raises(MemoryNotFound):
        await waiter


async def test_lists_go_page_by_page(memories: Any, store: MemoryStore) -> None:
    names = sorted(f"book-{n}" for n in range(7))
    await asyncio.gather(*(begin(memories, name) for name in names))
    await begin(memories, "theirs", tenant="other")
    cursor, pages = None, []
    while True:
        page, cursor = await memories.list.remote("acme", cursor, 3)
        pages.append([r.memory for r in page])
        if cursor is None:
            break
    assert pages == [names[:3], names[3:6], names[6:]]
    assert await memories.list.remote("acme", None, 7) == (await memories.list.remote("acme", None, 100))
    assert await memories.list.remote("nobody") == ([], None)


async def test_a_deleted_memory_is_gone_whatever_its_job_does(
    memories: Any, store: MemoryStore, tmp_path: Path
) -> None:
    key = await begin(memories, "book")
    manifest = store_memory(store, key, {"one": (3, 1)}, publish=False)
    await memories.delete.remote("acme", "book")
    assert not (tmp_path / "acme/book").exists()
    store.write_source(key, "one", "its Memorizer does not know yet")
    for late in (
        memories.get.remote("acme", "book"),
        memories.delete.remote("acme", "book"),
        memories.wait.remote("acme", "book", 0, 1),
    ):
        with pytest.raises(MemoryNotFound):
            await late
    for late in (
        memories.publish.remote(manifest),
        memories.progress.remote(key, "runner", 1, 2),
        memories.fail.remote(key, "late"),
    ):
        with pytest.raises(JobEnded):
            await late
    memories.die()
    assert await memories.list.remote("acme") == ([], None)
    again = await make(memories, store, "book")
    assert again.version != key.version


async def test_what_a_worker_writes_after_its_memory_is_deleted_is_collected(
    started: Any, store: MemoryStore, tmp_path: Path
) -> None:
    memories = started(grace_s=0.1)
    key = await begin(memories, "book")
    await memories.delete.remote("acme", "book")
    late = tmp_path / store.write_source(key, "one", "its Memorizer does not know yet").source.path
    assert late.exists()
    while late.exists():
        assert await memories.take.remote("runner", 0.1) is None


async def test_a_damaged_memory_does_not_stop_the_others(memories: Any, store: MemoryStore, tmp_path: Path) -> None:
    good, bad = await make(memories, store, "good"), await make(memories, store, "bad")
    path = tmp_path / bad.path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-10])
    memories.die()
    assert (await memories.read.remote("acme", "bad")).key.version == bad.version, "from its backup"
    for name in ("manifest.json", "manifest.backup.json"):
        path = tmp_path / bad.path / name
        path.write_bytes(path.read_bytes()[:-10])
    memories.die()
    assert (await memories.read.remote("acme", "good")).key.version == good.version
    record = await memories.get.remote("acme", "bad")
    assert record.status == "failed" and f"{bad.path}/manifest.json" in record.error
    again = await make(memories, store, "bad")
    assert again.version != bad.version


async def test_a_version_whose_publishing_was_cut_short_is_finished(
    memories: Any, store: MemoryStore, tmp_path: Path
) -> None:
    key = await make(memories, store, "book")
    (tmp_path / key.path / "manifest.json").unlink()
    memories.die()
    assert (await memories.read.remote("acme", "book")).key.version == key.version


@pytest.mark.parametrize("id", ["a/b", "..", "", "x" * 200])
async def test_names_are_checked_first(memories: Any, store: MemoryStore, id: str) -> None:
    for attempt in (
        memories.reserve.remote("acme", id, create=True),
        memories.reserve.remote(id, "book", create=True),
        memories.get.remote("acme", id),
        memories.delete.remote(id, "book"),
        memories.wait.remote("acme", id, 0, 1),
        memories.remove_document.remote("acme", id, "one"),
    ):
        with pytest.raises(InvalidId):
            await attempt
    assert store.storage.files("") == []
