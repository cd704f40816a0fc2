"""A version exists once its manifest does; whatever is damaged, missing or misnamed is a clear error."""

import errno
import json
import pickle
import random
import re
from pathlib import Path

import pytest

from benchmarks.support.stored_memories import store_memory
from cluster.storage.durable import DamagedFile
from memory_worker import errors
from memory_worker.errors import DamagedMemory, InvalidId, MemoryExists, MemoryNotFound
from memory_worker.manifest import JobRecord, Manifest, MemoryKey
from memory_worker.storage.store import MemoryStore, check_id, head_path, passages_path, segment_path, source_path


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(str(tmp_path))


def test_a_version_is_published_and_read_back(store: MemoryStore) -> None:
    key = store.new_version("acme", "book")
    manifest = store_memory(store, key, {"one": (40, 1), "two": (3, 2)}, publish=False)
    assert store.versions("acme", "book") == [] and store.all_versions("acme", "book") == [key.version]
    with pytest.raises(MemoryNotFound):
        store.read_manifest(key)
    store.publish(manifest)
    assert store.read_manifest(key) == manifest and store.current("acme", "book") == key
    assert manifest.slots == 5 + 43
    assert manifest.documents[1].segments[0].files[0].path == segment_path(key, "two", 0, 0)
    assert store.tenants() == ["acme"] and store.memories("acme") == ["book"]
    assert sorted(Path(p).relative_to(key.path).as_posix() for p in store.storage.files(key.path)) == [
        "head.safetensors",
        "manifest.backup.json",
        "manifest.json",
        "passages/one.safetensors",
        "passages/two.safetensors",
        "segments/one/0000-000000.safetensors",
        "segments/two/0000-000000.safetensors",
        "source/one.txt",
        "source/two.txt",
    ]


def test_publishing_twice_is_the_same_but_nothing_is_overwritten(store: MemoryStore) -> None:
    key = store.new_version("acme", "book")
    manifest = store_memory(store, key, {"one": (3, 1)})
    store.publish(manifest)
    with pytest.raises(MemoryExists):
        store.publish(manifest.model_copy(update={"title": "another"}))
    assert store.read_manifest(key).title is None


def test_versions_sort_by_age_and_no_name_is_used_twice(store: MemoryStore) -> None:
    names = []
    for _ in range(11):
        key = store.new_version("acme", "book")
        store_memory(store, key, {"one": (3, 1)})
        names.append(key.version)
    assert store.versions("acme", "book") == names == sorted(names)
    assert store.current("acme", "book").version == names[-1]
    store.delete("acme", "book")
    again = store.new_version("acme", "book").version
    assert again.startswith("v000001-") and again not in names


def test_a_deleted_memory_is_gone_and_a_cut_short_deletion_is_finished(store: MemoryStore, tmp_path: Path) -> None:
    for memory in ("book", "other"):
        store_memory(store, store.new_version("acme", memory), {"one": (3, 1)})
    (tmp_path / "acme/book/deleted").touch()  # as far as a deletion that was killed at once had come
    assert store.memories("acme") == ["other"]
    with pytest.raises(MemoryNotFound):
        store.current("acme", "book")
    store.sweep()
    assert not (tmp_path / "acme/book").exists() and store.current("acme", "other")


@pytest.mark.parametrize("late", [1, 3, 100])
def test_a_memory_is_deleted_while_a_worker_still_writes(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    """Its file appears when all others of the folder are gone already: the folder is not empty then."""
    key = store.new_version("acme", "book")
    store_memory(store, key, {"one": (3, 1)}, publish=False)
    times = 0

    def racing(path: str) -> None:
        nonlocal times
        if times < late:
            times += 1
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        delete_folder(path)

    delete_folder = store.storage.delete_folder
    monkeypatch.setattr(store.storage, "delete_folder", racing)
    if late < 100:
        store.delete("acme", "book")
        assert not (tmp_path / "acme/book").exists()
    else:
        with pytest.raises(OSError, match="not empty"):
            store.delete("acme", "book")
        assert store.memories("acme") == [], "it is deleted all the same, and swept away later"


def test_jobs_and_failures_are_kept(store: MemoryStore) -> None:
    key = store.new_version("acme", "book")
    assert store.job(key) is None and store.failure(key) is None
    job = JobRecord(documents=(store.write_source(key, "one", "text of it"),), ratio=4, language="zh", title="题目")
    store.begin(key, job)
    store.fail(key, "the model ran out of memory")
    assert store.job(key) == job and store.failure(key) == "the model ran out of memory"
    store.storage.write(f"{key.path}/job.json", b'{"documents": 3}')
    with pytest.raises(DamagedMemory, match=r"job.json"):
        store.job(key)
    store.discard(key)
    assert store.all_versions("acme", "book") == []


@pytest.mark.parametrize("id", ["a", "book", "Book-2.v1_x", "9", "a" * 128, "a..b"])
def test_good_ids(id: str) -> None:
    assert check_id(id, "memory") == id


@pytest.mark.parametrize(
    "id",
    ["", ".", "..", ".hidden", "a/b", "../x", "a\\b", "a b", "a\n", "a\0", "ä", "书", "-x", "_x", "a" * 129, "%2e"],
)
def test_bad_ids_are_refused_everywhere(store: MemoryStore, id: str) -> None:
    good = MemoryKey("acme", "book", "v000001-00000000")
    for attempt in (
        lambda: check_id(id, "memory"),
        lambda: store.memories(id),
        lambda: store.versions("acme", id),
        lambda: store.new_version(id, "book"),
        lambda: store.read_manifest(MemoryKey("acme", id, good.version)),
        lambda: store.read_manifest(MemoryKey("acme", "book", id)),
        lambda: store.delete("acme", id),
        lambda: source_path(good, id),
        lambda: segment_path(good, id, 0, 0),
        lambda: passages_path(good, id),
        lambda: head_path(MemoryKey(id, "book", good.version)),
        lambda: store.write_source(good, id, "text"),
    ):
        with pytest.raises(InvalidId, match=r"is not a .* id: use 1 to 128 of the letters"):
            attempt()


def test_old_versions_go_and_what_newer_ones_refer_to_stays(store: MemoryStore, tmp_path: Path) -> None:
    first, second = (store.new_version("acme", "book"), None)
    old = store_memory(store, first, {"one": (40, 1), "two": (3, 2)})
    second = store.new_version("acme", "book")
    new = store_memory(store, second, {"two": (5, 3)}, publish=False)
    store.publish(new.model_copy(update={"documents": (old.documents[0], new.documents[0]), "head": old.head}))
    third = store.new_version("acme", "book")
    store.write_source(third, "three", "a version in the making")
    assert store.collect("acme", "book", {second.version, third.version}) == [first.version]
    assert store.versions("acme", "book") == [second.version]
    read_whole(store, second)
    left = {Path(path).relative_to(first.path).as_posix() for path in store.storage.files(first.path)}
    assert left == {
        "head.safetensors",
        "passages/one.safetensors",
        "segments/one/0000-000000.safetensors",
        "source/one.txt",
    }
    assert store.storage.files(third.path)
    for name in ("manifest.json", "manifest.backup.json"):
        (tmp_path / second.path / name).write_text("damaged")
    with pytest.raises(DamagedMemory):
        store.collect("acme", "book", {second.version})
    assert store.storage.files(third.path), "nothing is deleted where it is not known what is needed"


def test_a_manifest_has_a_backup(store: MemoryStore, tmp_path: Path) -> None:
    key = store.new_version("acme", "book")
    manifest = store_memory(store, key, {"one": (3, 1)})
    path = tmp_path / key.path / "manifest.json"
    good = path.read_bytes()
    for harm in (b"", good[:-9], good.replace(b"acme", b"evil"), None):
        path.unlink() if harm is None else path.write_bytes(harm)
        assert store.read_manifest(key) == manifest and path.read_bytes() == good
    path.unlink()
    assert store.versions("acme", "book") == []
    assert store.finish_publishing(key) and store.versions("acme", "book") == [key.version]
    failed = store.new_version("acme", "book")
    unfinished = store_memory(store, failed, {"one": (3, 1)})
    (tmp_path / failed.path / "manifest.json").unlink()
    store.fail(failed, "cancelled")
    assert unfinished and not store.finish_publishing(failed)


def rewritten(path: Path, **changes: object) -> None:
    """Changes the manifest's content as one who knows the format would, digest included."""
    from memory_worker.storage.store import _canonical_digest

    content = json.loads(path.read_text())["manifest"] | changes
    path.write_text(json.dumps({"sha256": _canonical_digest(content), "manifest": content}))


def test_manifests_that_are_not_what_they_should_be(store: MemoryStore, tmp_path: Path) -> None:
    key = store.new_version("acme", "book")
    store_memory(store, key, {"one": (3, 1)})
    path = tmp_path / key.path / "manifest.json"
    (tmp_path / key.path / "manifest.backup.json").unlink()
    good = path.read_bytes()
    for change, reason in (
        (
            {"format": 2},
            "has format version 2, and this server reads 3; make the memory anew from its texts: "
            f"memorag memorize --id book {re.escape(str(tmp_path))}/acme/book/",
        ),
        ({"ratio": "x"}, "ratio: Input should be a valid integer"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"tenant": "evil"}, "is the manifest of another memory"),
    ):
        path.write_bytes(good)
        rewritten(path, **change)
        with pytest.raises(DamagedMemory, match=reason) as caught:
            store.read_manifest(key)
        assert caught.value.path == f"{key.path}/manifest.json"
    for data in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"sha256": 1}',
        b'{"sha256": 1, "manifest": 2}',
        b"\xff\xfe",
        b"[" * 10**5,
    ):
        path.write_bytes(data)
        with pytest.raises(DamagedMemory, match="is not a manifest"):
            store.read_manifest(key)


def read_whole(store: MemoryStore, key: MemoryKey) -> Manifest:
    """Reads all that a version is made of."""
    manifest = store.read_manifest(key)
    for segment in (manifest.head, *(file for s in manifest.segments for file in s.files)):
        store.read_segment(segment).tensors()
    for file in manifest.files:
        store.storage.read(file)
    return manifest


def test_every_changed_byte_of_every_file_is_noticed(store: MemoryStore, tmp_path: Path) -> None:
    key = store.new_version("acme", "book")
    manifest = store_memory(store, key, {"one": (40, 1)})
    chance = random.Random(0)
    (tmp_path / key.path / "manifest.backup.json").unlink()
    files = store.storage.files(key.path)
    assert len(files) == 5 and read_whole(store, key) == manifest
    for name in files:
        path = tmp_path / name
        good = path.read_bytes()
        places = range(len(good)) if len(good) < 100 else chance.sample(range(len(good)), 100)
        for damage in [*places, "short", "long", "missing"]:
            bad = bytearray(good)
            if isinstance(damage, int):
                bad[damage] ^= 1 << chance.randrange(8)
            elif damage == "short":
                del bad[-1]
            else:
                bad.append(0)
            path.unlink()
            if damage != "missing":
                path.write_bytes(bad)
            try:
                unchanged = read_whole(store, key)
            except (DamagedFile, MemoryNotFound) as error:
                assert name.endswith("manifest.json") if isinstance(error, MemoryNotFound) else error.path == name
            else:  # white space between the manifest's values may differ
                assert name.endswith("manifest.json") and unchanged == manifest
        path.write_bytes(good)
    assert read_whole(store, key) == manifest


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidId("memory", "a/b"),
        errors.MemoryNotFound("book"),
        errors.MemoryExists("book"),
        errors.EmptyDocument("one"),
        errors.MemoryNotReady("book", "memorizing"),
        errors.MemoryNotReady("book", "failed", "no space left"),
        errors.DamagedMemory("t/m/v/manifest.json", "is not a manifest"),
        errors.WrongModel("book", "a" * 64, "b" * 64),
        errors.VersionChanged("book", "v000001-0", "v000002-0"),
        errors.DocumentNotFound("book", "one", ("two",)),
        errors.LastDocument("book", "one"),
        errors.QueueFull(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes_and_say_what_to_do(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
    assert ";" in str(error) or ": use " in str(error)
