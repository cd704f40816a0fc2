"""Whatever fails while a version is made, and whenever: the old version or the new, whole, and never a third thing."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.support.stored_memories import store_memory
from cluster.storage.durable import DamagedFile, StorageFull
from memory_worker.catalog.restore import restore
from memory_worker.errors import MemoryNotFound
from memory_worker.manifest import JobRecord, Manifest, MemoryKey
from memory_worker.messages import MemoryRecord
from memory_worker.storage.store import MemoryStore
from tests.support.faults import Mode, every_point

FIRST = MemoryKey("acme", "book", "v000001-00000001")
SECOND = MemoryKey("acme", "book", "v000002-00000002")


def old_version(root: Path) -> Manifest:
    return store_memory(MemoryStore(str(root)), FIRST, {"one": (20, 1), "two": (3, 2)})


def make_new_version(root: Path) -> Manifest:
    """What a job does that replaces the second document, and the catalog after it."""
    store = MemoryStore(str(root))
    base = store.read_manifest(FIRST)
    document = store.write_source(SECOND, "two", "text")
    job = JobRecord(
        kind="put",
        base=FIRST.version,
        documents=(document,),
        ratio=4,
        language="en",
    )
    store.begin(SECOND, job)
    made = store_memory(store, SECOND, {"two": (7, 3)}, publish=False)
    new = base.model_copy(
        update={
            "version": SECOND.version,
            "parent": FIRST.version,
            "documents": (base.documents[0], made.documents[0]),
            "created": "2026-01-01T00:00:00.000+00:00",
        }
    )
    store.publish(new)
    return new


def restored(root: Path) -> tuple[MemoryRecord | None, Manifest | None]:
    """What a catalog that starts now knows, every file of it read and verified."""
    store = MemoryStore(str(root))
    found = list(restore(store))
    assert [each.name for each in found] in ([], [("acme", "book")])
    record, manifest = (found[0].record, found[0].manifest) if found else (None, None)
    if manifest:
        assert record and record.status == "ready" and store.read_manifest(record.key) == manifest
        for file in manifest.files:
            store.storage.read(file)
    return record, manifest


def cases(tmp_path: Path, run, modes: tuple[Mode, ...] = tuple(Mode)):
    """Every fault in `run` over a fresh copy of the old version; yields the fault and the root after it."""
    template = tmp_path / "template"
    old_version(template)
    root = tmp_path / "root"

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)

    fresh()
    for fault in every_point(lambda: run(root), modes):
        fresh()
        with fault.injected(), suppress(*fault.raised, MemoryNotFound):
            run(root)
        yield fault, root


def test_a_new_version_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    seen = set()
    for fault, root in cases(tmp_path, make_new_version):
        record, manifest = restored(root)
        assert record is not None and manifest is not None, fault
        assert record.version in (FIRST.version, SECOND.version), fault
        assert [d.id for d in manifest.documents] == ["one", "two"], fault
        assert manifest.documents[1].slots == (3 if record.version == FIRST.version else 7), fault
        if record.version == FIRST.version and record.job:
            assert record.job.key == SECOND and record.job.base == record.key, fault
            make_again = MemoryStore(str(root))
            again = store_memory(make_again, SECOND, {"two": (7, 3)}, publish=False)
            make_again.publish(
                manifest.model_copy(
                    update={
                        "version": SECOND.version,
                        "documents": (manifest.documents[0], again.documents[0]),
                    }
                )
            )
            assert restored(root)[1].version == SECOND.version, fault  # type: ignore[union-attr]
        seen.add(record.version)
    assert seen == {FIRST.version, SECOND.version}


def test_deleting_old_versions_never_harms_the_new_one(tmp_path: Path) -> None:
    def collect(root: Path) -> None:
        MemoryStore(str(root)).collect("acme", "book", {SECOND.version})

    template = tmp_path / "template"
    old_version(template)
    make_new_version(template)
    root = tmp_path / "root"
    shutil.copytree(template, root)
    for fault in every_point(lambda: collect(root)):
        shutil.rmtree(root)
        shutil.copytree(template, root)
        with fault.injected(), suppress(*fault.raised, MemoryNotFound):
            collect(root)
        _, manifest = restored(root)
        assert manifest is not None and manifest.version == SECOND.version, fault
        collect(root)  # the next time it is done
        store = MemoryStore(str(root))
        assert store.versions("acme", "book") == [SECOND.version], fault
        assert not any("two" in path for path in store.storage.files(FIRST.path)), fault
        for file in manifest.files:
            store.storage.read(file)


def test_a_deletion_that_is_cut_short_is_none_or_is_finished(tmp_path: Path) -> None:
    def delete(root: Path) -> None:
        MemoryStore(str(root)).delete("acme", "book", "0a1b2c3d")

    kept = gone = 0
    for fault, root in cases(tmp_path, delete):
        record, _ = restored(root)
        assert MemoryStore(str(root)).was_deleted_by("acme", "0a1b2c3d") == (record is None), fault
        if record is None:
            gone += 1
            assert not list((root / "acme").rglob("*.safetensors")), fault
        else:
            kept += 1
            assert record.status == "ready" and record.version == FIRST.version, fault
    assert kept and gone


def test_a_full_disk_is_said_and_harms_nothing(tmp_path: Path) -> None:
    template = tmp_path / "template"
    old = old_version(template)
    root = tmp_path / "root"
    shutil.copytree(template, root)
    refused = 0
    for fault in every_point(lambda: make_new_version(root), (Mode.FULL,)):
        shutil.rmtree(root)
        shutil.copytree(template, root)
        with fault.injected():
            try:
                make_new_version(root)
            except StorageFull as full:
                refused += 1
                assert "free space or delete memories" in str(full)
            except (OSError, DamagedFile):
                continue  # a read that fails with ENOSPC is no full disk
        _, manifest = restored(root)
        assert manifest is not None
        assert manifest == old or manifest.version == SECOND.version
    assert refused > 20


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "extend"])
def test_every_damaged_file_of_a_version_is_named_and_never_used(tmp_path: Path, harm: str) -> None:
    root = tmp_path / "root"
    old_version(root)
    new = make_new_version(root)
    store = MemoryStore(str(root))
    files = {file.path: file for file in new.files}
    for path, entry in files.items():
        good = (root / path).read_bytes()
        harmed(root / path, harm)
        with pytest.raises(DamagedFile) as caught:
            store.storage.read(entry)
        assert caught.value.path == path and path in str(caught.value)
        (root / path).unlink(missing_ok=True)
        (root / path).write_bytes(good)
    for name in ("manifest.json", "manifest.backup.json"):
        good = (root / SECOND.path / name).read_bytes()
        harmed(root / SECOND.path / name, harm)
        assert restored(root)[1] == new
        (root / SECOND.path / name).unlink(missing_ok=True)
        (root / SECOND.path / name).write_bytes(good)
    for name in ("manifest.json", "manifest.backup.json"):
        harmed(root / SECOND.path / name, harm if harm != "delete" else "flip")
    record, manifest = restored(root)
    assert manifest is None
    assert record is not None and record.status == "failed" and f"{SECOND.path}/manifest.json" in str(record.error)


def harmed(path: Path, harm: str) -> None:
    """A new file in the place of this one, as a disk that lies would show it."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if harm == "flip":
        data[len(data) // 2] ^= 1
    elif harm == "truncate":
        del data[len(data) // 2 :]
    elif harm == "extend":
        data += b"\0"
    if harm != "delete":
        path.write_bytes(data)
