"""A memory as one file: `memorag export` and `import`. Called by the Ingress.

An archive is a tar whose first member is the manifest, sealed with its own digest, and whose others are the files it
names, each called by its SHA-256. What comes in is not trusted: every file is checked against the manifest's record of
it and goes to a path that is made here; what it holds is checked by its reader, as that of any stored file.
"""

import tarfile
from collections.abc import Iterator
from typing import IO

from cluster.storage.durable import DamagedFile, Storage, StoredFile
from memory_worker.errors import InvalidId
from memory_worker.manifest import DocumentEntry, Manifest, MemoryKey, now
from memory_worker.storage.store import head_path, open_manifest, passages_path, seal, segment_path, source_path
from serving.errors import ProblemError

MEDIA_TYPE = "application/x-tar"
_MANIFEST = "manifest.json"
_MANIFEST_BYTES = 64 * 2**20
_PIECE_BYTES = 1 << 20


def pack(storage: Storage, manifest: Manifest) -> Iterator[bytes]:
    """The archive in pieces.

    Raises `DamagedFile` where a file is not as it was written: the archive ends early then, and is not one.
    """
    sealed = seal(manifest)
    yield _header(_MANIFEST, len(sealed)) + sealed + _pad(len(sealed))
    for file in {file.digest: file for file in manifest.files}.values():
        content = memoryview(storage.read(file))
        yield _header(file.digest, file.size)
        for start in range(0, file.size, _PIECE_BYTES):
            yield bytes(content[start : start + _PIECE_BYTES])
        yield _pad(file.size)
    yield bytes(2 * tarfile.BLOCKSIZE)


class Archive:
    """An archive that was received, on disk. Raises `ProblemError` 422 where it is not one."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            self._tar = tarfile.open(fileobj=file, mode="r:", errorlevel=2)  # noqa: SIM115  it lives as long as `file`
            members = self._tar.getmembers()
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise _refused(f"it cannot be read: {error}") from None
        if not members or members[0].name != _MANIFEST or not 0 < members[0].size <= _MANIFEST_BYTES:
            raise _refused("it does not begin with a manifest")
        if not all(member.isreg() for member in members):
            raise _refused("it holds links or folders")
        self._members = {member.name: member for member in members}
        try:
            self.manifest = open_manifest(self._open(_MANIFEST).read(), _MANIFEST)
        except DamagedFile as damage:
            raise _refused(f"its {damage.path} {damage.reason}") from None

    def unpack(self, storage: Storage, key: MemoryKey) -> Manifest:
        """Stores every file as the version `key`; returns its manifest, which is not published yet.

        Raises `ProblemError` 422 naming the file that is missing or not what the manifest says.
        """
        was = self.manifest
        if len({document.id for document in was.documents}) != len(was.documents) or not was.documents:
            raise _refused("its manifest names a document twice, or none")
        try:
            return was.model_copy(
                update={
                    "tenant": key.tenant,
                    "memory": key.memory,
                    "version": key.version,
                    "parent": None,
                    "created": now(),
                    "head": self._store(storage, was.head, head_path(key)),
                    "documents": tuple(self._document(storage, key, document) for document in was.documents),
                }
            )
        except InvalidId as error:
            raise _refused(str(error)) from None

    def _document(self, storage: Storage, key: MemoryKey, was: DocumentEntry) -> DocumentEntry:
        segments = []
        for number, segment in enumerate(was.segments):
            paths = [segment_path(key, was.id, number, part) for part in range(len(segment.files))]
            files = [self._store(storage, file, path) for file, path in zip(segment.files, paths, strict=True)]
            segments.append(segment.model_copy(update={"files": tuple(files)}))
        return was.model_copy(
            update={
                "source": self._store(storage, was.source, source_path(key, was.id)),
                "passages": self._store(storage, was.passages, passages_path(key, was.id)),
                "segments": tuple(segments),
            }
        )

    def _store(self, storage: Storage, file: StoredFile, path: str) -> StoredFile:
        content = self._open(file.digest)
        stored = storage.write(path, iter(lambda: content.read(_PIECE_BYTES), b""))
        if (stored.size, stored.digest) != (file.size, file.digest):
            raise _refused(f"its file for {file.path} does not match its SHA-256")
        return stored

    def _open(self, name: str) -> IO[bytes]:
        member = self._members.get(name)
        content = self._tar.extractfile(member) if member else None
        if content is None:
            raise _refused(f"it lacks the file {name}")
        return content


def _refused(reason: str) -> ProblemError:
    return ProblemError(
        422, f"this is no whole archive of a memory, since {reason}; send one that 'memorag export' made"
    )


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT)


def _pad(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
