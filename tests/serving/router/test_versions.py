"""A version is read from storage once, kept within bounds, and asked of the Catalog where storage has lost it."""

import asyncio
import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.durable import Storage
from memory_worker.errors import DamagedMemory, MemoryNotFound
from memory_worker.manifest import Manifest, MemoryKey
from memory_worker.storage.store import MemoryStore
from serving.router.versions import AskedVersions, Versions, bytes_of
from tests.support import manifests as made
from tests.support.stand_in_handles import Handle

OTHER = MemoryKey("acme", "log", "v000001-00000003")


class Catalog:
    def __init__(self, known: dict[MemoryKey, Manifest]) -> None:
        self.known = known
        self.asked = 0

    async def restore_manifest(self, key: MemoryKey) -> Manifest:
        self.asked += 1
        if key not in self.known:
            raise MemoryNotFound(key.memory)
        return self.known[key]


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    store = MemoryStore(str(tmp_path))
    for key in (made.KEY, OTHER):
        store.publish(made.memory(store.storage, key))
    return store


def versions_of(store: MemoryStore, capacity: int = 1 << 20, **known: Any) -> tuple[Versions, Catalog]:
    catalog = Catalog(known.get("known", {}))
    handle: Any = Handle(catalog)
    return Versions(store.storage.root, handle, 1000, capacity), catalog


async def test_it_is_read_once_and_so_is_what_is_derived(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[MemoryKey] = []
    read_manifest = MemoryStore.read_manifest

    def read(self: MemoryStore, key: MemoryKey) -> Manifest:
        reads.append(key)
        return read_manifest(self, key)

    monkeypatch.setattr(MemoryStore, "read_manifest", read)
    versions, _ = versions_of(store)
    first, *others = await asyncio.gather(*(versions.of([made.KEY]) for _ in range(8)))
    both = await versions.of([OTHER, made.KEY])
    assert all(other is first for other in others) and reads.count(made.KEY) == 1 and len(reads) == 2
    assert first.index is others[0].index and first.groups is others[0].groups
    assert [manifest.memory for manifest in both.manifests] == ["log", "book"]
    assert both.manifests[1] is first.manifests[0] and both is await versions.of([OTHER, made.KEY])
    assert both.index.name == f"{OTHER.path}+{made.KEY.path}" and both.index.parts is not None
    assert [range.key for group in both.groups for range in group.ranges] == [OTHER, made.KEY]


async def test_no_more_is_kept_than_may_be(store: MemoryStore) -> None:
    versions, _ = versions_of(store)
    one = await versions.of([made.KEY])
    versions, _ = versions_of(store, capacity=int(1.5 * bytes_of(one)))
    first = await versions.of([made.KEY])
    assert first is await versions.of([made.KEY])
    await versions.of([OTHER])
    assert first is not await versions.of([made.KEY]), "the other one took its place"
    versions, _ = versions_of(store, capacity=0)
    assert (await versions.manifest(made.KEY)).version == made.KEY.version, "larger than all that may be kept"


async def test_what_storage_lost_the_catalog_has(store: MemoryStore, tmp_path: Path) -> None:
    manifest = store.read_manifest(made.KEY)
    versions, catalog = versions_of(store, known={made.KEY: manifest})
    (tmp_path / made.KEY.path / "manifest.json").write_bytes(b"{}")
    assert await versions.manifest(made.KEY) == manifest and catalog.asked == 0, "from its backup"
    versions, catalog = versions_of(store, known={made.KEY: manifest})
    for name in ("manifest.json", "manifest.backup.json"):
        (tmp_path / made.KEY.path / name).unlink()
        (tmp_path / OTHER.path / name).write_bytes(b"{}")
    assert await versions.manifest(made.KEY) == manifest and catalog.asked == 1
    with pytest.raises(DamagedMemory, match=f"{OTHER.path}/manifest.json"):
        await versions.manifest(OTHER)
    store.restore_manifest(manifest.model_copy(update={"memory": "log", "version": OTHER.version}))
    assert (await versions.manifest(OTHER)).memory == "log", "a failure is not kept"


@pytest.mark.parametrize(("documents", "files"), [(400, 1), (40, 20)])
def test_what_is_kept_takes_about_what_is_counted(tmp_path: Path, documents: int, files: int) -> None:
    store = MemoryStore(str(tmp_path))
    manifest = made.memory(Storage(str(tmp_path)), documents=[f"document-{n:04d}" for n in range(documents)])

    def with_files(number: int) -> Any:
        document = manifest.documents[number]
        segment = document.segments[0].model_copy(update={"files": document.segments[0].files[:1] * files})
        return document.model_copy(update={"segments": (segment,)})

    store.publish(manifest.model_copy(update={"documents": tuple(map(with_files, range(documents)))}))
    gc.collect()
    tracemalloc.start()
    try:
        asked = AskedVersions((store.read_manifest(made.KEY),), 10_000)
        assert asked.index.parts and asked.groups
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.5 < bytes_of(asked) / taken < 2
