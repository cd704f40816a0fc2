"""All that `cluster/storage/durable.py` does to a disk or an object store, one effect a method, and nothing else does.

`Storage` decides which effects, in which order; so a test that replaces these can let any one of them fail.
"""

import hashlib
import mmap
import os
from pathlib import Path
from typing import IO

import pyarrow as pa
from pyarrow import fs

_MAP_BYTES = 1 << 20  # smaller files are read, not mapped


class RemoteFiles:
    """Files in an object store, through `pyarrow.fs`."""

    is_local = False

    def __init__(self, system: fs.FileSystem) -> None:
        self._system = system

    def create_folder(self, path: str) -> None:
        """Makes the folder, which may be there already. An object store makes what is missing above it, too."""
        self._system.create_dir(path, recursive=True)

    def open_write(self, path: str) -> IO[bytes]:
        return self._system.open_output_stream(path)

    def write(self, stream: IO[bytes], data: memoryview) -> None:
        """Writes all of `data`."""
        stream.write(data)

    def sync(self, stream: IO[bytes]) -> None:
        """Has all that was written survive a loss of power. An object store's files do once they are closed."""

    def close(self, stream: IO[bytes]) -> None:
        stream.close()

    def rename(self, source: str, target: str) -> None:
        """Gives the file another name, replacing what has it."""
        self._system.move(source, target)

    def sync_folder(self, path: str) -> None:
        """Has the names in the folder, and the absence of others, survive a loss of power."""

    def delete_file(self, path: str) -> None:
        self._system.delete_file(path)

    def delete_folder(self, path: str) -> None:
        self._system.delete_dir(path)

    def read(self, path: str) -> tuple[pa.Buffer, str]:
        """The whole file and its SHA-256."""
        with self._system.open_input_file(path) as source:
            buffer = source.read_buffer(source.size())
        return buffer, hashlib.sha256(memoryview(buffer)).hexdigest()

    def list(self, path: str, recursive: bool) -> list[fs.FileInfo]:
        """What is in the folder; nothing if it is not there."""
        return self._system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))

    def kind(self, path: str) -> fs.FileType:
        return self.info(path).type

    def info(self, path: str) -> fs.FileInfo:
        """What is under this name: kind, size."""
        return self._system.get_file_info(path)


class LocalFiles(RemoteFiles):
    """The same on a local file system, where durability has to be asked for."""

    is_local = True

    def __init__(self) -> None:
        super().__init__(fs.LocalFileSystem())

    def create_folder(self, path: str) -> None:
        Path(path).mkdir(exist_ok=True)

    def open_write(self, path: str) -> IO[bytes]:
        return open(path, "xb", buffering=0)  # noqa: PTH123

    def write(self, stream: IO[bytes], data: memoryview) -> None:
        while data:
            data = data[stream.write(data) :]

    def sync(self, stream: IO[bytes]) -> None:
        os.fsync(stream.fileno())

    def rename(self, source: str, target: str) -> None:
        Path(source).replace(target)

    def sync_folder(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def delete_file(self, path: str) -> None:
        Path(path).unlink()

    def read(self, path: str) -> tuple[pa.Buffer, str]:
        """The whole file and its SHA-256, memory-mapped if it is large.

        The digest is taken by reading: a bad sector is then an error, where touching a mapped page of it kills
        the process.
        """
        with open(path, "rb", buffering=0) as source:  # noqa: PTH123
            if os.fstat(source.fileno()).st_size < _MAP_BYTES:
                data = source.read()
                return pa.py_buffer(data), hashlib.sha256(data).hexdigest()
            digest = hashlib.file_digest(source, "sha256").hexdigest()
            return pa.py_buffer(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)), digest


def files_at(root: str) -> tuple[RemoteFiles, str]:
    """The file system that a storage root is in, and the root's path there, without a slash at its end."""
    if "://" not in root:
        return LocalFiles(), str(Path(root).resolve())
    system, base = fs.FileSystem.from_uri(root)
    base = base.rstrip("/")
    return (LocalFiles() if isinstance(system, fs.LocalFileSystem) else RemoteFiles(system)), base
