"""The catalog gives a name to one job only, tells who waits, and may be killed at any moment."""

import asyncio
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from memory_worker.catalog import catalog
from memory_worker.errors import InvalidId, MemoryExists, MemoryNotFound, MemoryNotReady
from memory_worker.manifest import JobDocument, JobRecord
from memory_worker.messages import MemoryKey, MemoryRecord
from memory_worker.store import MemoryStore
from tests.memory_worker.actors import kill_and_await_restart
from tests.memory_worker.stored import store_memory


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="cat", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=300 * 2**20,
            _temp_dir=folder,
            logging_level="ERROR",
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(str(tmp_path))


@pytest.fixture
def memories(cluster: None, store: MemoryStore) -> Iterator[Any]:
    actor = catalog(store.storage.root, f"test-{uuid.uuid4().hex}")
    yield actor
    ray.kill(actor)


def job(*documents: str, title: str | None = None) -> JobRecord:
    return JobRecord(
        documents=tuple(JobDocument(id=d, characters=4) for d in documents or ("one",)),
        ratio=4,
        language="en",
        title=title,
    )


async def make(memories: Any, store: MemoryStore, memory: str, tenant: str = "acme") -> MemoryKey:
    key = await memories.begin.remote(tenant, memory, job())
    await memories.publish.remote(store_memory(store, key, {"one": (3, 1)}, publish=False))
    return key


async def test_from_begin_to_ready(memories: Any, store: MemoryStore) -> None:
    work = job("one", title="A Book")
    key = await memories.begin.remote("acme", "book", work)
    record = await memories.get.remote("acme", "book")
    assert (record.status, record.key, record.created) == ("memorizing", key, work.created)
    assert record.job == work
    with pytest.raises(MemoryNotReady, match="still being made"):
        await memories.ready.remote("acme", "book")
    await memories.progress.remote(key, 30, 100)
    record = await memories.get.remote("acme", "book")
    assert (record.done_tokens, record.total_tokens) == (30, 100)
    assert await memories.unfinished.remote() == [(key, work)]
    manifest = store_memory(store, key, {"one": (3, 1)}, publish=False)
    await memories.publish.remote(manifest)
    await memories.publish.remote(manifest)
    record = await memories.get.remote("acme", "book")
    assert (record.status, record.manifest, record.version) == ("ready", manifest, key.version)
    assert await memories.ready.remote("acme", "book") == manifest == store.read_manifest(key)
    assert await memories.unfinished.remote() == []


async def test_of_many_that_begin_at_once_one_wins(memories: Any, store: MemoryStore) -> None:
    tries = await asyncio.gather(
        *(memories.begin.remote("acme", "book", job()) for _ in range(32)), return_exceptions=True
    )
    keys = [t for t in tries if isinstance(t, MemoryKey)]
    assert len(keys) == 1 and store.all_versions("acme", "book") == [keys[0].version]
    assert all(isinstance(t, MemoryExists) for t in tries if t is not keys[0])
    assert await memories.begin.remote("other-tenant", "book", job())


async def test_the_same_job_again_is_the_same_key(memories: Any, store: MemoryStore) -> None:
    work = job()
    key = await memories.begin.remote("acme", "book", work)
    assert await memories.begin.remote("acme", "book", work) == key
    kill_and_await_restart(memories)
    assert await memories.begin.remote("acme", "book", work) == key
    await memories.publish.remote(store_memory(store, key, {"one": (3, 1)}, publish=False))
    with pytest.raises(MemoryExists, match="choose another id"):
        await memories.begin.remote("acme", "book", job())


async def test_a_failed_memory_says_why_and_can_be_made_again(memories: Any, store: MemoryStore) -> None:
    key = await memories.begin.remote("acme", "book", job())
    for _ in range(2):
        await memories.fail.remote(key, "no space left on device")
    for _ in range(2):  # the second time as storage has it
        record = await memories.get.remote("acme", "book")
        assert (record.status, record.error, record.key) == ("failed", "no space left on device", key)
        with pytest.raises(MemoryNotReady, match="no space left on device"):
            await memories.ready.remote("acme", "book")
        assert await memories.unfinished.remote() == []
        kill_and_await_restart(memories)
    again = await memories.begin.remote("acme", "book", job())
    assert again.version != key.version
    assert store.all_versions("acme", "book") == [again.version]
    with pytest.raises(MemoryNotFound):
        await memories.progress.remote(key, 1, 2)
    await memories.publish.remote(store_memory(store, again, {"one": (3, 1)}, publish=False))
    assert (await memories.get.remote("acme", "book")).status == "ready"


async def test_killed_at_any_moment_it_knows_what_storage_knows(memories: Any, store: MemoryStore) -> None:
    ready = [await make(memories, store, f"book-{n}") for n in range(5)]
    failed, running = [await memories.begin.remote("acme", name, job()) for name in ("failed", "running")]
    await memories.fail.remote(failed, "broken")
    before, _ = await memories.list.remote("acme")
    kill_and_await_restart(memories)
    after, _ = await memories.list.remote("acme")

    def known(records: list[MemoryRecord]) -> list[Any]:
        return [(r.memory, r.version, r.status, r.created, r.manifest, r.job, r.error) for r in records]

    assert known(after) == known(before) and len(after) == 7
    assert {r.revision for r in before}.isdisjoint(r.revision for r in after)
    assert [key for key, _ in await memories.unfinished.remote()] == [running]
    await memories.progress.remote(running, 1, 2)  # the runner goes on as if nothing had happened
    assert (await memories.ready.remote("acme", "book-3")).version == ready[3].version


async def test_kills_while_jobs_are_made_lose_and_double_nothing(memories: Any, store: MemoryStore) -> None:
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
    key = await memories.begin.remote("acme", "book", job())
    seen = (await memories.get.remote("acme", "book")).revision
    assert (await memories.wait.remote("acme", "book", seen, 0.05)).revision == seen
    waiting = [memories.wait.remote("acme", "book", seen, 60) for _ in range(1500)]
    await asyncio.sleep(0.2)
    await memories.progress.remote(key, 10, 100)  # not held up by those who wait
    records = await asyncio.gather(*waiting)
    assert {r.done_tokens for r in records} == {10} and records[0].revision != seen
    waiter = memories.wait.remote("acme", "book", records[0].revision, 60)
    kill_and_await_restart(memories)
    assert (await waiter).revision != records[0].revision
    waiter = memories.wait.remote("acme", "book", (await memories.get.remote("acme", "book")).revision, 60)
    await memories.delete.remote("acme", "book")
    with pytest.raises(MemoryNotFound):
        await waiter


async def test_lists_go_page_by_page(memories: Any, store: MemoryStore) -> None:
    names = sorted(f"book-{n}" for n in range(7))
    await asyncio.gather(*(memories.begin.remote("acme", name, job()) for name in names))
    await memories.begin.remote("other", "theirs", job())
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
    key = await memories.begin.remote("acme", "book", job())
    manifest = store_memory(store, key, {"one": (3, 1)}, publish=False)
    await memories.delete.remote("acme", "book")
    assert not (tmp_path / "acme/book").exists()
    store.write_source(key, "one", "its Memorizer does not know yet")
    for late in (
        memories.publish.remote(manifest),
        memories.progress.remote(key, 1, 2),
        memories.fail.remote(key, "late"),
        memories.get.remote("acme", "book"),
        memories.delete.remote("acme", "book"),
        memories.wait.remote("acme", "book", 0, 1),
    ):
        with pytest.raises(MemoryNotFound):
            await late
    kill_and_await_restart(memories)
    assert await memories.list.remote("acme") == ([], None)
    again = await make(memories, store, "book")
    assert again.version != key.version


async def test_a_damaged_memory_does_not_stop_the_others(memories: Any, store: MemoryStore, tmp_path: Path) -> None:
    good, bad = await make(memories, store, "good"), await make(memories, store, "bad")
    path = tmp_path / bad.path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-10])
    kill_and_await_restart(memories)
    assert (await memories.ready.remote("acme", "good")).version == good.version
    record = await memories.get.remote("acme", "bad")
    assert record.status == "failed" and f"{bad.path}/manifest.json" in record.error


@pytest.mark.parametrize("id", ["a/b", "..", "", "x" * 200])
async def test_names_are_checked_first(memories: Any, store: MemoryStore, id: str) -> None:
    for attempt in (
        memories.begin.remote("acme", id, job()),
        memories.begin.remote(id, "book", job()),
        memories.begin.remote("acme", "book", job(id)),
        memories.get.remote("acme", id),
        memories.delete.remote(id, "book"),
        memories.wait.remote("acme", id, 0, 1),
    ):
        with pytest.raises(InvalidId):
            await attempt
    assert store.storage.files("") == []
