"""Files appear whole or not at all, and are read back only as they were written."""

import errno
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.storage.durable import DamagedFile, Storage, StorageFull, StorageGone, StoredFile


@pytest.fixture(params=["local", "file URI", "object store"])
def storage(request, tmp_path: Path) -> Storage:
    """The object store is pyarrow's in-memory file system, which has no memory maps and no rename."""
    return Storage(
        {"local": str(tmp_path), "file URI": f"file://{tmp_path}", "object store": "mock:///bucket"}[request.param]
    )


def test_what_is_written_is_read(storage: Storage) -> None:
    stored = storage.write("a/b/data.bin", (bytes([n]) * 1000 for n in range(50)))
    assert stored.size == 50_000 and len(stored.digest) == 64
    assert storage.read(stored).to_pybytes() == b"".join(bytes([n]) * 1000 for n in range(50))
    assert storage.record("a/b/data.bin") == stored
    assert storage.exists("a/b/data.bin") and not storage.exists("a/b/other.bin")


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    stored = storage.write("empty", b"")
    assert stored.size == 0 and storage.read(stored).to_pybytes() == b""


def test_folders_and_files_are_listed_and_deleted(storage: Storage) -> None:
    for path in ("t/m/v1/manifest.json", "t/m/v1/segments/a.safetensors", "t/m/v2/manifest.json", "t/n/x"):
        storage.write(path, b"x")
    assert storage.folders("t") == ["m", "n"]
    assert storage.folders("nothing") == [] and storage.files("nothing") == []
    assert storage.files("t/m") == ["t/m/v1/manifest.json", "t/m/v1/segments/a.safetensors", "t/m/v2/manifest.json"]
    storage.delete_folder("t/m")
    storage.delete_folder("t/m")
    assert storage.files("t") == ["t/n/x"]


def test_a_file_is_not_read_unless_it_is_as_recorded(storage: Storage) -> None:
    stored = storage.write("data", b"0123456789")
    with pytest.raises(DamagedFile, match=r"'other' is missing"):
        storage.read(replace(stored, path="other"))
    with pytest.raises(DamagedFile, match="has 10 bytes instead of 11"):
        storage.read(replace(stored, size=11))
    storage.write("data", b"0123456780")
    with pytest.raises(DamagedFile, match=r"'data' does not match its SHA-256.*memorize the document again"):
        storage.read(stored)


def test_a_file_is_deleted_if_it_is_there(storage: Storage) -> None:
    storage.write("a/b", b"x")
    storage.write("a/c", b"x")
    for _ in range(2):
        storage.delete("a/b")
        assert storage.files() == ["a/c"]


def test_a_write_that_fails_keeps_what_was_there(storage: Storage) -> None:
    stored = storage.write("data", b"old")
    with pytest.raises(RuntimeError, match="on fire"), storage.writer("data") as sink:
        sink.write(b"new")
        raise RuntimeError("the disk is on fire")
    assert storage.read(stored).to_pybytes() == b"old" and storage.files() == ["data"]


def test_a_write_that_fails_leaves_nothing(storage: Storage) -> None:
    def parts():
        yield b"the first half"
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        storage.write("data", parts())
    assert not storage.exists("data") and storage.files("") == []


def test_torn_temporary_files_are_not_seen(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    pid = os.fork()
    if pid == 0:  # a writer that dies in the middle
        with storage.writer("folder/data") as sink:
            sink.write(b"half")
            os._exit(1)
    os.waitpid(pid, 0)
    assert [p.suffix for p in (tmp_path / "folder").iterdir()] == [".tmp"]
    assert storage.files("") == [] and not storage.exists("folder/data")
    stored = storage.write("folder/data", b"whole")
    assert storage.read(stored).to_pybytes() == b"whole" and storage.files("") == ["folder/data"]
    assert storage.sweep_torn(older_than_s=60) == 0  # a live writer's would look the same
    assert storage.sweep_torn("folder", older_than_s=-1) == 1 and storage.sweep_torn(older_than_s=-1) == 0
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["data"]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../outside", "a/../../outside", "a//b", "a/./b", "a\\b", "a\0b", "a" * 201]
)
def test_no_path_leaves_the_root(storage: Storage, path: str) -> None:
    for attempt in (storage.exists, storage.read_unverified, storage.files, lambda p: storage.write(p, b"x")):
        with pytest.raises(ValueError, match="not a path below the storage root"):
            attempt(path)


def test_a_root_that_is_gone_is_not_taken_for_files_that_are(tmp_path: Path) -> None:
    """Nor made anew, as if it were empty: what was written there would be hidden when it is back."""
    root, away = tmp_path / "root", tmp_path / "away"
    storage = Storage(str(root))
    stored = storage.write("a/data", b"whole")
    root.rename(away)
    for attempt in (
        lambda: storage.read(stored),
        lambda: storage.read_unverified("a/data"),
        lambda: storage.record("a/data"),
        lambda: storage.exists("a/data"),
        lambda: storage.folders(),
        lambda: storage.files("a"),
        lambda: storage.write("a/data", b"new"),
        lambda: storage.write("b/data", b"new"),
    ):
        with pytest.raises(StorageGone, match="is not there: bring it back"):
            attempt()
    assert not root.exists()
    away.rename(root)
    assert storage.read(stored).to_pybytes() == b"whole" and storage.files() == ["a/data"]


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedFile("a/b", "is missing")))  # noqa: S301
    assert (error.path, error.reason) == ("a/b", "is missing") and "a/b" in str(error)
    full = pickle.loads(pickle.dumps(StorageFull("/data")))  # noqa: S301
    assert str(full).startswith("the storage at /data is full: free space") and full.errno == errno.ENOSPC
    gone = pickle.loads(pickle.dumps(StorageGone("/data")))  # noqa: S301
    assert str(gone).startswith("the storage at /data is not there: ")


def test_local_reads_are_memory_mapped(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    buffer = storage.read(storage.write("data", bytes(1 << 20)))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert mapped and buffer.size == 1 << 20
    assert isinstance(storage.record("data"), StoredFile)


def test_a_small_file_outlives_what_happens_to_it(tmp_path: Path) -> None:
    """A mapped file that is cut short in place kills whoever reads on: only large ones are mapped."""
    storage = Storage(str(tmp_path))
    buffer = storage.read(storage.write("data", data := os.urandom((1 << 20) - 1)))
    os.truncate(tmp_path / "data", 0)
    assert buffer.to_pybytes() == data
