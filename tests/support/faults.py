"""A file system in which any one effect can fail: an error, a full disk, a process that dies, a loss of power.

    for fault in every_point(run):  # `run` makes its own `Storage` objects
        ...                         # have everything as it was before `run`
        with fault.injected(), suppress(*fault.raised):
            run()
        ...                         # look at what is left, with new `Storage` objects

Every `Storage` made within `injected` is faulty, in all threads, whoever makes it: a `MemoryStore`, a `Retriever`.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest import mock

import cluster.storage.durable
from cluster.storage.files import RemoteFiles

CHANGES = ("create_folder", "open_write", "write", "sync", "close", "rename", "sync_folder")
DELETES = ("delete_file", "delete_folder")
READS = ("read", "list", "kind")


class Crash(BaseException):
    """The process is dead: not even its `except Exception` runs. Each further effect raises it again."""


class Mode(Enum):
    ERROR = "the effect fails with EIO and does not happen; of a write, the first half happens"
    LATE_ERROR = "the effect happens, and then fails with EIO"
    FULL = "the effect fails with ENOSPC; of a write, the first half happens"
    CRASH = "the process dies before the effect; in a write or the deletion of a folder, half-way"
    POWER_LOSS = "as CRASH, and all that was not synced is lost; only on a local file system"


class Fault:
    """What happens at the `point`-th effect, counted from 0. Without a point nothing does, and effects are counted."""

    def __init__(self, point: int | None = None, mode: Mode = Mode.ERROR, effect: str | None = None) -> None:
        self.point, self.mode, self.effect = point, mode, effect
        self.effects: list[str] = []  # names of those that came so far
        self.dead = False
        self._lock = threading.RLock()
        self._unsynced: list[tuple[str, Callable[[], object]]] = []  # what must be synced, and what else is lost

    @property
    def raised(self) -> tuple[type[BaseException], ...]:
        """What `Storage` may end with; a layer above may have errors of its own for these."""
        dies = self.mode in (Mode.CRASH, Mode.POWER_LOSS)
        return (Crash,) if dies else (OSError, cluster.storage.durable.DamagedFile)

    @contextmanager
    def injected(self) -> Iterator["Fault"]:
        """Makes the storages of this block faulty. What a loss of power takes is gone when it ends."""
        healthy = cluster.storage.durable.files_at  # type: ignore[attr-defined]  # patched where it is used

        def faulty(root: str) -> tuple[Any, str]:
            files, base = healthy(root)
            return _FaultyFiles(self, files), base

        try:
            with mock.patch.object(cluster.storage.durable, "files_at", faulty):
                yield self
        finally:
            if self.dead and self.mode is Mode.POWER_LOSS:
                for _, lose in reversed(self._unsynced):
                    lose()
            self._unsynced.clear()

    def happen(self, files: RemoteFiles, name: str, *args: Any, **kwargs: Any) -> Any:
        """Has the effect happen, or not, or by half. One at a time, so that a run can be counted."""
        with self._lock:
            if self.dead:
                raise Crash
            due = len(self.effects) == self.point
            self.effects.append(name)
            if due:
                half = {"write": _half_a_write, "delete_folder": _half_a_deletion}.get(name)
                if self.mode is Mode.LATE_ERROR:
                    getattr(files, name)(*args, **kwargs)
                elif half and files.is_local:
                    half(files, *args)
                if self.mode in (Mode.CRASH, Mode.POWER_LOSS):
                    self.dead = True
                    raise Crash
                code = errno.ENOSPC if self.mode is Mode.FULL else errno.EIO
                raise OSError(code, os.strerror(code), f"effect {self.point}: {name}")
            lose = _loss(name, *args) if files.is_local else None
            result = getattr(files, name)(*args, **kwargs)
            if lose:
                self._unsynced.append(lose)
            elif name in ("sync", "sync_folder") and files.is_local:
                synced = args[0] if name == "sync_folder" else _key(args[0])
                self._unsynced = [waiting for waiting in self._unsynced if waiting[0] != synced]
            return result

    def __repr__(self) -> str:
        return f"{self.mode.name} at effect {self.point}, {self.effect}"


def every_point(run: Callable[[], object], modes: tuple[Mode, ...] = tuple(Mode)) -> Iterator[Fault]:
    """Each effect of `run`, which is run once to count them, in each of the modes that it can fail in."""
    counting = Fault()
    with counting.injected():
        run()
    for point, effect in enumerate(counting.effects):
        for mode in modes:
            # A file that is made either is there or is not; and nothing is late in reading.
            late = mode is not Mode.LATE_ERROR or effect not in ("open_write", *READS)
            if late and (mode is not Mode.FULL or effect in CHANGES):
                yield Fault(point, mode, effect)


class _FaultyFiles:
    """A file system whose effects go through a `Fault`."""

    def __init__(self, fault: Fault, files: RemoteFiles) -> None:
        self._fault, self._files = fault, files

    def __getattr__(self, name: str) -> Any:
        if name in (*CHANGES, *DELETES, *READS):
            return partial(self._fault.happen, self._files, name)
        return getattr(self._files, name)


def _half_a_write(files: RemoteFiles, stream: IO[bytes], data: memoryview) -> None:
    files.write(stream, data[: len(data) // 2])


def _half_a_deletion(files: RemoteFiles, path: str) -> None:
    inside = sorted(p for p in Path(path).rglob("*") if p.is_file())
    for file in inside[: len(inside) // 2]:
        file.unlink()


def _key(stream: IO[bytes]) -> str:
    return f"data of {os.fstat(stream.fileno()).st_ino}"


def _loss(name: str, *args: Any) -> tuple[str, Callable[[], object]] | None:
    """What a loss of power would take back of an effect that is about to happen, and what has to be synced first."""
    if name == "write":
        stream = os.fdopen(os.dup(args[0].fileno()), "r+b", buffering=0)  # follows the file through renames
        return _key(stream), partial(stream.truncate, os.fstat(stream.fileno()).st_size)
    if name not in (*CHANGES, *DELETES) or name in ("sync", "close", "sync_folder"):
        return None
    path = Path(args[-1])
    if name == "create_folder":
        lose = partial(shutil.rmtree, path, ignore_errors=True) if not path.exists() else int
    elif name == "open_write":
        lose = partial(path.unlink, missing_ok=True)
    elif name == "rename":
        lose = partial(_rename_back, Path(args[0]), path, path.read_bytes() if path.exists() else None)
    else:
        lose = partial(_restore, {p: p.read_bytes() for p in (path, *path.rglob("*")) if p.is_file()})
    return str(path.parent), lose


def _rename_back(source: Path, target: Path, replaced: bytes | None) -> None:
    with suppress(FileNotFoundError):  # its folder was deleted since
        target.replace(source)
        if replaced is not None:
            target.write_bytes(replaced)


def _restore(files: dict[Path, bytes]) -> None:
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
