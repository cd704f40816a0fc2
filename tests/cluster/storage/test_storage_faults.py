"""Whatever fails, and whenever: what was stored stays, what is new is there or not, and nothing is left over."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from pyarrow import fs

import cluster.storage.durable
from cluster.storage.durable import DamagedFile, Storage, StorageFull
from cluster.storage.files import RemoteFiles
from tests.support.faults import Crash, Fault, Mode, every_point

OLD, NEW = b"old" * 1000, b"new" * 1000
PATH = "tenant/memory/v1/data"


def write(root: Path) -> None:
    Storage(str(root)).write(PATH, [NEW[:1500], NEW[1500:]])


def content(root: Path) -> bytes | None:
    storage = Storage(str(root))
    if not storage.exists(PATH):
        return None
    assert storage.read(storage.record(PATH)).to_pybytes() == storage.read_unverified(PATH).to_pybytes()
    return storage.read_unverified(PATH).to_pybytes()


class Roots:
    """New storage roots, with or without an old file in them."""

    def __init__(self, folder: Path, old: bytes | None) -> None:
        self._folder, self._old, self._count = folder, old, 0
        self.root = folder

    def next(self) -> Path:
        self._count += 1
        self.root = self._folder / f"case-{self._count}" / "root"
        self.root.parent.mkdir()
        if self._old is not None:
            Storage(str(self.root)).write(PATH, self._old)
        return self.root


@pytest.mark.parametrize("old", [None, OLD], ids=["new file", "replaced file"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, old: bytes | None) -> None:
    roots, seen = Roots(tmp_path, old), set()
    for fault in every_point(partial(write, roots.next())):
        root = roots.next()
        with fault.injected(), pytest.raises(fault.raised) as failure:
            write(root)
        seen.add((fault.effect, fault.mode))
        found = content(root)
        assert found in (old, NEW), fault
        if fault.mode is Mode.FULL:
            assert isinstance(failure.value, StorageFull), fault
            assert str(root) in str(failure.value) and "free space or delete memories" in str(failure.value)
            assert found == old or fault.effect == "sync_folder", fault
        left = list(root.rglob("*.tmp"))
        if fault.mode in (Mode.CRASH, Mode.POWER_LOSS):
            assert Storage(str(root)).sweep_torn(older_than_s=-1) == len(left)
            assert not list(root.rglob("*.tmp"))
        else:
            assert not left, fault
        write(root)  # and nothing that is left stands in the way
        assert content(root) == NEW
    assert {effect for effect, _ in seen} >= {
        "create_folder", "sync_folder", "open_write", "write", "sync", "close", "rename"
    }  # fmt: skip
    assert {mode for _, mode in seen} == set(Mode)


def test_what_a_write_returned_from_survives_any_later_loss_of_power(tmp_path: Path) -> None:
    """Also where its folders were made by a writer that died before it had made them durable."""

    def work(root: Path) -> None:
        with suppress(OSError):
            Storage(str(root)).write("tenant/other/v1/data", OLD)
        write(root)
        Storage(str(root)).delete("tenant/no such file")

    roots = Roots(tmp_path, None)
    for fault in every_point(partial(work, roots.next()), modes=(Mode.ERROR,)):
        root = roots.next()
        root.mkdir()  # a root that is there is taken to be durable: whoever set up the server made it
        power = Fault(None, Mode.POWER_LOSS)
        with power.injected():
            with fault.injected(), suppress(OSError):
                work(root)
            write(root)
            power.dead = True
        assert content(root) == NEW, fault


def test_a_deleted_file_is_there_or_is_not(tmp_path: Path) -> None:
    roots = Roots(tmp_path, OLD)

    def work() -> None:
        Storage(str(roots.root)).delete(PATH)

    roots.next()
    for fault in every_point(work):
        root = roots.next()
        with fault.injected(), suppress(*fault.raised):
            work()
        assert content(root) in (None, OLD), fault


@pytest.mark.parametrize(
    "delete", [lambda s: s.delete(PATH), lambda s: s.delete_folder("tenant/memory")], ids=["file", "folder"]
)
def test_what_was_deleted_stays_deleted(tmp_path: Path, delete: Callable[[Storage], None]) -> None:
    root = Roots(tmp_path, OLD).next()
    power = Fault(None, Mode.POWER_LOSS)
    with power.injected():
        delete(Storage(str(root)))
        power.dead = True
    assert content(root) is None


def test_a_deletion_that_is_cut_short_can_be_done_again(tmp_path: Path) -> None:
    roots = Roots(tmp_path, None)

    def filled() -> Path:
        root = roots.next()
        for name in ("a", "b/c", "b/d"):
            Storage(str(root)).write(f"memory/{name}", OLD)
        Storage(str(root)).write("other", OLD)
        return root

    def work() -> None:
        Storage(str(roots.root)).delete_folder("memory")

    filled()
    for fault in every_point(work):
        root = filled()
        with fault.injected(), suppress(*fault.raised):
            work()
        Storage(str(root)).delete_folder("memory")
        assert Storage(str(root)).files() == ["other"], fault


def test_reading_tells_damage_or_gives_the_file(tmp_path: Path) -> None:
    stored = Storage(str(tmp_path / "root")).write(PATH, OLD)

    def work() -> None:
        storage = Storage(str(tmp_path / "root"))
        assert storage.read(stored).to_pybytes() == OLD
        assert storage.files() == [PATH]

    for fault in every_point(work, modes=(Mode.ERROR, Mode.CRASH)):
        with fault.injected(), pytest.raises(fault.raised) as failure:
            work()
        if fault.mode is Mode.ERROR and fault.effect == "read":
            assert isinstance(failure.value, DamagedFile) and "cannot be read" in str(failure.value)


def test_failing_to_clean_up_does_not_hide_the_error(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    class Stubborn:
        def __getattr__(self, name):
            return getattr(healthy, name)

        def delete_file(self, path: str) -> None:
            raise PermissionError(errno.EPERM, "not yours", path)

    healthy, storage._files = storage._files, Stubborn()
    with pytest.raises(RuntimeError, match="on fire") as failure, storage.writer("data") as sink:
        sink.write(b"half")
        raise RuntimeError("the disk is on fire")
    assert "could not be removed" in failure.value.__notes__[0] and "not yours" in failure.value.__notes__[0]
    assert storage.files() == []


@pytest.fixture
def bucket(monkeypatch) -> Iterator[fs.FileSystem]:
    """An object store that outlives its `Storage`s: nothing in it can be synced, and a stream's close publishes."""
    system, base = fs.FileSystem.from_uri("mock:///bucket")
    monkeypatch.setattr(cluster.storage.durable, "files_at", lambda root: (RemoteFiles(system), base))
    yield system


@pytest.mark.parametrize("old", [None, OLD], ids=["new object", "replaced object"])
def test_an_object_is_the_old_one_or_the_new_one(bucket: fs.FileSystem, old: bytes | None) -> None:
    def reset() -> None:
        with suppress(FileNotFoundError):
            bucket.delete_dir("bucket")
        if old is not None:
            Storage("mock://").write(PATH, old)

    def work() -> None:
        Storage("mock://").write(PATH, [NEW[:1500], NEW[1500:]])

    reset()
    for fault in every_point(work, modes=(Mode.ERROR, Mode.LATE_ERROR)):
        reset()
        with fault.injected(), suppress(*fault.raised):
            work()
        storage = Storage("mock://")
        assert (content(Path("any")) if storage.exists(PATH) else None) in (old, NEW), fault
        assert storage.sweep_torn(older_than_s=-1) == 0, fault


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_harms_nothing(full_disk: Path) -> None:
    storage = Storage(str(full_disk / "root"))
    old = storage.write("a/old", bytes(100_000))
    for path in ("a/old", "b/c/new"):
        with pytest.raises(StorageFull, match="is full: free space or delete memories; nothing that was stored"):
            storage.write(path, (bytes(10_000) for _ in range(100)))
    assert storage.read(old).size == 100_000 and storage.files() == ["a/old"]
    assert not list(full_disk.rglob("*.tmp"))
    storage.delete("a/old")
    storage.write("b/c/new", bytes(200_000))  # the room is there again


def test_a_file_over_the_limit_of_the_process_harms_nothing(tmp_path: Path) -> None:
    """The error of a limit is not that of a full disk: it is told as it is."""
    storage = Storage(str(tmp_path))
    old = storage.write("data", OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            storage.write("data", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert storage.read(old).to_pybytes() == OLD and not list(tmp_path.glob("*.tmp"))


def test_a_crash_is_final() -> None:
    fault = Fault(0, Mode.CRASH)
    with fault.injected():
        for _ in range(2):
            with pytest.raises(Crash):
                Storage("mock:///bucket").exists("a")
