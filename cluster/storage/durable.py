"""Durable files under one root, local or in an object store.

Every file is immutable once written, appears whole or not at all, and is read back only if its size and
SHA-256 are those recorded when it was written. All rooms keep their durable files through this module.
"""

import errno
import hashlib
import io
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Annotated, Any

import pyarrow as pa
from pyarrow import fs
from pydantic import AfterValidator, ConfigDict, Field

from cluster.errors import ExpectedError
from cluster.storage.files import files_at

_MAX_PATH_CHARACTERS = 1024
_MAX_NAME_BYTES = 200  # file systems take 255, of which a temporary name needs 37 more
_TORN = re.compile(r"\.[0-9a-f]{32}\.tmp$")  # being written, or left by a writer that died


class DamagedFile(ExpectedError):
    """A stored file is missing, unreadable, has another size, or another digest than its record says."""

    path: str
    reason: str
    template = "stored file {path!r} {reason}; restore it or memorize the document again"


class StorageFull(ExpectedError, OSError):
    """There is no room for what was to be written. What was stored before is as it was."""

    root: str
    status = 507
    template = "the storage at {root} is full: free space or delete memories; nothing that was stored is harmed"

    def __post_init__(self) -> None:
        self.errno = errno.ENOSPC


class StorageGone(ExpectedError, OSError):
    """The root itself is not there: not mounted, perhaps. That a file is missing then says nothing about the file."""

    root: str
    status = 503
    template = "the storage at {root} is not there: bring it back, and all goes on as before"

    def __post_init__(self) -> None:
        self.errno = errno.ENODEV


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The record of one durable file. As part of a pydantic model it is checked; storage's own are right by making."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: Annotated[str, AfterValidator(lambda path: check_path(path))]  # relative to the root, with forward slashes
    size: Annotated[int, Field(ge=0)]  # bytes
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256


def check_path(path: str) -> str:
    """`path` itself if it can name a file below a storage root, whoever chose it; `ValueError` otherwise."""
    parts = path.split("/")
    if (
        len(path) > _MAX_PATH_CHARACTERS
        or not path.isprintable()  # nor are lone surrogates, which have no bytes
        or "\\" in path
        or any(part in ("", ".", "..") or len(part.encode()) > _MAX_NAME_BYTES for part in parts)
    ):
        shown = path if len(path) <= 140 else path[:137] + "..."
        raise ValueError(
            f"{shown!r} is not a path below the storage root: use names separated by '/', none of them '..'"
        )
    return path


class Storage:
    """Files under one root: a local folder, or a URI that `pyarrow.fs` understands (s3://, gs://, …).

    A write without room for it raises `StorageFull`, and everything raises `StorageGone` while a local root is not
    there: it is made here, once, and never again. Paths are relative to the root and pass `check_path`.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._files, self._base = files_at(root)
        self.is_local = self._files.is_local
        self._durable: set[str] = set()  # folders whose own names are known to survive a loss of power
        if self.is_local:
            with self._telling_full():
                self._make_folder(self._base, root=True)

    def write(self, path: str, parts: bytes | Iterable[bytes]) -> StoredFile:
        """Writes `parts` as the file `path`, durably, replacing what was there."""
        with self.writer(path) as writer:
            for part in [parts] if isinstance(parts, bytes) else parts:
                writer.write(part)
        return writer.stored

    @contextmanager
    def writer(self, path: str) -> Iterator["DigestingWriter"]:
        """A binary sink whose file appears under `path`, durably, when the block ends without an exception.

        After an exception, what was under `path` before is still there.
        """
        target = self._full(path)
        folder = target.rpartition("/")[0]
        with self._telling_full():
            self._make_folder(folder)
            # An object store publishes on close, so only what would replace something is written beside its place.
            direct = not self.is_local and not self.exists(path)
            place = target if direct else f"{target}.{uuid.uuid4().hex}.tmp"
            stream = self._files.open_write(place)
        try:
            yield DigestingWriter(lambda data: self._write(stream, data), path)
            with self._telling_full():
                self._files.sync(stream)
                self._files.close(stream)
                if place != target:
                    self._files.rename(place, target)
                self._files.sync_folder(folder)
        except BaseException as error:
            self._abandon(stream, place, error)
            raise

    def read(self, file: StoredFile) -> pa.Buffer:
        """The whole file, after its size and digest were checked; a large local one is memory-mapped.

        Raises `DamagedFile` where they differ from the record, or the disk cannot read it.
        """
        with self._telling_damage(file.path):
            buffer, digest = self._files.read(self._full(file.path))
        _check(file, buffer.size, digest)
        return buffer

    def read_unverified(self, path: str) -> pa.Buffer:
        """The whole file without a check: for manifests, which carry the digests of the others."""
        with self._telling_gone():
            return self._files.read(self._full(path))[0]

    def record(self, path: str) -> StoredFile:
        """The record of a file that is already there."""
        with self._telling_gone():
            buffer, digest = self._files.read(self._full(path))
        return StoredFile(path, buffer.size, digest)

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of this name."""
        there = self._files.kind(self._full(path)) != fs.FileType.NotFound
        if not there:
            self._require_root()
        return there

    def folders(self, path: str = "") -> list[str]:
        """Names of the folders directly under `path`, sorted; none if it is not there."""
        found = self._list(path, recursive=False)
        return sorted(i.base_name for i in found if i.type == fs.FileType.Directory)

    def files(self, path: str = "") -> list[str]:
        """Paths of all whole files anywhere under `path`, relative to the root, sorted."""
        return sorted(i.path[len(self._base) + 1 :] for i in self._all(path) if not _TORN.search(i.path))

    def delete(self, path: str) -> None:
        """Deletes the file, durably, if it is there."""
        target = self._full(path)
        with suppress(FileNotFoundError):
            self._files.delete_file(target)
            self._files.sync_folder(target.rpartition("/")[0])

    def delete_folder(self, path: str) -> None:
        """Deletes the folder and all under it, durably, if it is there.

        Cut short, it leaves any part of it: delete the file that gives the others meaning before, on its own.
        """
        target = self._full(path)
        with suppress(FileNotFoundError):
            self._files.delete_folder(target)
            self._files.sync_folder(target.rpartition("/")[0])

    def sweep_torn(self, path: str = "", *, older_than_s: float) -> int:
        """Removes what dead writers left under `path`; returns how many files.

        A live writer's file looks the same: `older_than_s` is longer than any writer pauses between two writes.
        """
        latest = time.time() - older_than_s
        torn = [i.path for i in self._all(path) if _TORN.search(i.path) and i.mtime_ns < latest * 1e9]
        for target in torn:
            with suppress(FileNotFoundError):
                self._files.delete_file(target)
        return len(torn)

    def _full(self, path: str) -> str:
        return f"{self._base}/{check_path(path)}"

    def _folder(self, path: str) -> str:
        return self._full(path) if path else self._base

    def _all(self, path: str) -> Iterator[fs.FileInfo]:
        return (i for i in self._list(path, recursive=True) if i.type == fs.FileType.File)

    def _list(self, path: str, *, recursive: bool) -> list[fs.FileInfo]:
        found = self._files.list(self._folder(path), recursive=recursive)
        if not found:
            self._require_root()
        return found

    def _require_root(self) -> None:
        """Raises `StorageGone` if nothing can be there."""
        if self.is_local and self._files.kind(self._base) != fs.FileType.Directory:
            raise StorageGone(self.root)

    def _make_folder(self, folder: str, *, root: bool = False) -> None:
        """Makes the folder, durably as all between it and the root: a file survives only if each name above it does.

        The root itself only if it is asked for.
        """
        if not self.is_local:
            return self._files.create_folder(folder)
        above = len(folder) <= len(self._base)
        if (above or folder in self._durable) and self._files.kind(folder) == fs.FileType.Directory:
            return
        if above and not root:
            raise StorageGone(self.root)
        parent = folder.rpartition("/")[0] or "/"
        self._make_folder(parent, root=root)
        self._files.create_folder(folder)
        self._files.sync_folder(parent)  # also where another made it: it may not have come so far
        self._durable.add(folder)

    def _write(self, stream: IO[bytes], data: memoryview) -> None:
        with self._telling_full():
            self._files.write(stream, data)

    def _abandon(self, stream: IO[bytes], place: str, error: BaseException) -> None:
        """Removes what was written; if that fails too, `error` says so and stays the one that is raised."""
        try:
            with suppress(FileNotFoundError):
                try:
                    self._files.close(stream)  # a collected stream of an object store would be closed, and published
                finally:
                    self._files.delete_file(place)
        except OSError as another:
            error.add_note(f"{place} could not be removed: {another}")

    @contextmanager
    def _telling_gone(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            self._require_root()
            raise

    @contextmanager
    def _telling_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(self.root) from error
            raise

    @contextmanager
    def _telling_damage(self, path: str) -> Iterator[None]:
        try:
            with self._telling_gone():
                yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DamagedFile(path, "is missing") from None
        except OSError as error:
            if self.is_local and error.errno == errno.EIO:
                raise DamagedFile(path, f"cannot be read ({error.strerror})") from error
            raise


class DigestingWriter(io.RawIOBase):
    """A writable binary stream that counts and digests what passes; `stored` is the record of the file.

    Arrow writers close their sink: that closes only this view, the file closes with the block that opened it.
    """

    def __init__(self, write: Callable[[memoryview], None], path: str) -> None:
        self._write = write
        self._path = path
        self._digest = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._write(view)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    @property
    def stored(self) -> StoredFile:
        return StoredFile(self._path, self._size, self._digest.hexdigest())


def _check(file: StoredFile, size: int, digest: str) -> None:
    if size != file.size:
        raise DamagedFile(file.path, f"has {size} bytes instead of {file.size}")
    if digest != file.digest:
        raise DamagedFile(file.path, "does not match its SHA-256")
