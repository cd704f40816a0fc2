"""Durable files under one root, local or in an object store, through `pyarrow.fs`.

Every file is immutable once written, appears whole or not at all, and is read back only if its size and
SHA-256 are those recorded when it was written. All rooms keep their durable files through this module.
"""

import hashlib
import io
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import fs

_DIGEST_CHUNK_BYTES = 1 << 24
_TORN = re.compile(r"\.[0-9a-f]{32}\.tmp$")  # left by a writer that died


class DamagedFile(Exception):
    """A stored file is missing, has another size, or another digest than its record says."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"stored file {path!r} {reason}; restore it or memorize the document again")

    def __reduce__(self) -> tuple[Any, ...]:
        return (DamagedFile, (self.path, self.reason))


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The record of one durable file."""

    path: str  # relative to the storage root, with forward slashes
    size: int  # bytes
    digest: str  # SHA-256, hexadecimal


class Storage:
    """Files under one root: a local folder, or a URI that `pyarrow.fs` understands (s3://, gs://, …)."""

    def __init__(self, root: str) -> None:
        self.root = root
        if "://" in root:
            self._fs, self._base = fs.FileSystem.from_uri(root)
        else:
            self._fs, self._base = fs.LocalFileSystem(use_mmap=True), str(Path(root).resolve())
            Path(self._base).mkdir(parents=True, exist_ok=True)
        self.is_local = isinstance(self._fs, fs.LocalFileSystem)

    def write(self, path: str, parts: bytes | Iterable[bytes]) -> StoredFile:
        """Writes `parts` as the file `path`, durably, replacing what was there."""
        with self.writer(path) as writer:
            for part in [parts] if isinstance(parts, bytes) else parts:
                writer.write(part)
        return writer.stored

    @contextmanager
    def writer(self, path: str) -> Iterator["DigestingWriter"]:
        """A binary sink whose file appears under `path` when the block ends without an exception."""
        target = self._full(path)
        self._fs.create_dir(target.rpartition("/")[0], recursive=True)
        # Object stores publish on close; a local file is written beside its place and renamed into it.
        temporary = f"{target}.{uuid.uuid4().hex}.tmp" if self.is_local else target
        stream = self._fs.open_output_stream(temporary)
        writer = DigestingWriter(stream, path)
        try:
            yield writer
        except BaseException:
            stream.close()  # an unclosed stream of an object store would be closed, and published, by its destructor
            self._fs.delete_file(temporary)
            raise
        stream.close()
        if self.is_local:
            _sync(temporary)
            Path(temporary).replace(target)
            _sync(target.rpartition("/")[0])

    def read(self, file: StoredFile) -> pa.Buffer:
        """The whole file, memory-mapped when local, after its size and digest were checked.

        Raises `DamagedFile` where they differ from the record.
        """
        try:
            buffer = self.read_unverified(file.path)
        except FileNotFoundError:
            raise DamagedFile(file.path, "is missing") from None
        if buffer.size != file.size:
            raise DamagedFile(file.path, f"has {buffer.size} bytes instead of {file.size}")
        if _digest(buffer) != file.digest:
            raise DamagedFile(file.path, "does not match its SHA-256")
        return buffer

    def read_unverified(self, path: str) -> pa.Buffer:
        """The whole file without a check: for manifests, which carry the digests of the others."""
        with self._fs.open_input_file(self._full(path)) as source:
            return source.read_buffer(source.size())

    def record(self, path: str) -> StoredFile:
        """The record of a file that is already there."""
        buffer = self.read_unverified(path)
        return StoredFile(path, buffer.size, _digest(buffer))

    def exists(self, path: str) -> bool:
        return self._fs.get_file_info(self._full(path)).type != fs.FileType.NotFound

    def folders(self, path: str = "") -> list[str]:
        """Names of the folders directly under `path`, sorted; none if it is not there."""
        selector = fs.FileSelector(self._full(path), allow_not_found=True)
        return sorted(i.base_name for i in self._fs.get_file_info(selector) if i.type == fs.FileType.Directory)

    def files(self, path: str) -> list[str]:
        """Paths of all whole files anywhere under `path`, relative to the root, sorted."""
        selector = fs.FileSelector(self._full(path), allow_not_found=True, recursive=True)
        found = (i.path for i in self._fs.get_file_info(selector) if i.type == fs.FileType.File)
        return sorted(name[len(self._base) :].lstrip("/") for name in found if not _TORN.search(name))

    def delete_folder(self, path: str) -> None:
        """Deletes the folder and all under it, if it is there."""
        if self.exists(path):
            self._fs.delete_dir(self._full(path))

    def _full(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} is not a path below the storage root")
        return f"{self._base}/{path}".rstrip("/")


class DigestingWriter(io.RawIOBase):
    """A writable binary stream that counts and digests what passes; `stored` is the record of the file.

    Arrow writers close their sink: that closes only this view, the file closes with the block that opened it.
    """

    def __init__(self, stream: IO[bytes], path: str) -> None:
        self._stream = stream
        self._path = path
        self._digest = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._stream.write(view)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    @property
    def stored(self) -> StoredFile:
        return StoredFile(self._path, self._size, self._digest.hexdigest())


def _digest(buffer: pa.Buffer) -> str:
    digest = hashlib.sha256()
    view = memoryview(buffer)
    for start in range(0, buffer.size, _DIGEST_CHUNK_BYTES):
        digest.update(view[start : start + _DIGEST_CHUNK_BYTES])
    return digest.hexdigest()


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
