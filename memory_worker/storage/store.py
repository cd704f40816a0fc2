"""The durable tier of all memories: what lies where under the storage root, and how a version is published.

    <root>/<tenant>/.deleted/  which calls deleted a memory in the last hour
    <root>/<tenant>/<memory>/<version>/
        source/<doc>.txt
        job.json               written when the work begins; with no manifest beside it, the work is unfinished
        failed.json            the work was given up, and why
        head.safetensors       the head's slots
        segments/<doc>/…       slots, some windows a file; checkpoint.json counts those of an unfinished job
        passages/<doc>.safetensors  the retrieval room's
        manifest.backup.json   the manifest, should the other be damaged
        manifest.json          written last: the version exists from then on

A version refers to files of earlier versions where a document is the same. The Catalog, the MemoryKeepers and the
Memorizers use this module; the Ingress writes the sources through it.
"""

import errno
import hashlib
import json
import logging
import re
import shlex
import time
import uuid
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.storage.durable import Storage, StoredFile
from memory_worker.errors import DamagedMemory, InvalidId, MemoryExists, MemoryNotFound
from memory_worker.head_pools import Counts
from memory_worker.manifest import FORMAT, Document, JobRecord, Manifest, MemoryKey, MemoryShape
from memory_worker.storage.segments import Segment, write_slots

if TYPE_CHECKING:
    import torch

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_T = TypeVar("_T", bound=BaseModel)
_VERSION = re.compile(r"v(\d{6})-[0-9a-f]{8}")
_REQUEST = re.compile(r"[0-9a-f]{8}")
_ABOUT = ("manifest.json", "manifest.backup.json", "job.json")  # what a version has beside the files of its manifest
_TORN_S = 24 * 3600.0
_REMEMBERED_S = 3600.0  # how long a call that was answered may be repeated
_DELETE_ATTEMPTS = 20  # a worker that is told of the end writes a handful of files at most
logger = logging.getLogger(__name__)


def check_id(id: str, what: str) -> str:
    """`id` itself if it can be a `what` (tenant, memory, version or document) id; `InvalidId` otherwise."""
    if not _ID.fullmatch(id):
        raise InvalidId(what, id)
    return id


def new_request() -> str:
    """Names one call, so that it can be told from another like it when Ray repeats it after a restart."""
    return uuid.uuid4().hex[:8]


def source_path(key: MemoryKey, document: str) -> str:
    """Where the document's text lies, relative to the storage root."""
    return f"{_folder(key)}/source/{_join(document=document)}.txt"


def segment_path(key: MemoryKey, document: str, segment: int, first_window: int) -> str:
    """Where the slots of a document's segment lie from that window on, relative to the storage root."""
    return f"{_folder(key)}/segments/{_join(document=document)}/{segment:04d}-{first_window:06d}.safetensors"


def passages_path(key: MemoryKey, document: str) -> str:
    """Where the document's passages lie, relative to the storage root."""
    return f"{_folder(key)}/passages/{_join(document=document)}.safetensors"


def checkpoint_path(key: MemoryKey) -> str:
    """Where an unfinished job notes how far it is, relative to the storage root."""
    return f"{_folder(key)}/checkpoint.json"


def head_path(key: MemoryKey) -> str:
    """Where the head's segment lies, relative to the storage root."""
    return f"{_folder(key)}/head.safetensors"


class MemoryStore:
    """All memories under one storage root. Every method touches the disk or network: call it from a thread."""

    def __init__(self, root: str) -> None:
        self.storage = Storage(root)

    def tenants(self) -> list[str]:
        return self._list_ids("")

    def memories(self, tenant: str) -> list[str]:
        """Ids of the tenant's memories, ready or not, that are not deleted."""
        return [m for m in self._list_ids(_join(tenant=tenant)) if not self.is_deleted(tenant, m)]

    def versions(self, tenant: str, memory: str) -> list[str]:
        """The published versions, oldest first."""
        return [v for v in self.all_versions(tenant, memory) if self._has(tenant, memory, v, "manifest.json")]

    def all_versions(self, tenant: str, memory: str) -> list[str]:
        """Versions with or without a manifest, oldest first."""
        return [name for name in self.storage.folders(_join(tenant=tenant, memory=memory)) if _VERSION.fullmatch(name)]

    def current(self, tenant: str, memory: str) -> MemoryKey:
        """The newest published version; `MemoryNotFound` if there is none."""
        versions = self.versions(tenant, memory)
        if not versions or self.is_deleted(tenant, memory):
            raise MemoryNotFound(memory)
        return MemoryKey(tenant, memory, versions[-1])

    def new_version(self, tenant: str, memory: str, request: str | None = None) -> MemoryKey:
        """A key that sorts after all versions of the memory and was never used, even by a deleted memory.

        `request`, as `new_request` makes it, names the call that makes the version: `version_of` finds it again.
        """
        versions = self.all_versions(tenant, memory)
        number = 1 + int(_VERSION.fullmatch(versions[-1])[1]) if versions else 1  # type: ignore[index]
        return MemoryKey(tenant, memory, f"v{number:06d}-{request or new_request()}")

    def version_of(self, tenant: str, memory: str, request: str) -> str | None:
        """The published version that this request has made, if it is kept still."""
        return next((version for version in self.versions(tenant, memory) if version.endswith(f"-{request}")), None)

    def read_manifest(self, key: MemoryKey) -> Manifest:
        """Raises `MemoryNotFound`, or `DamagedMemory` if neither copy is the manifest that was published."""
        try:
            return self._manifest(key, "manifest.json")
        except (DamagedMemory, MemoryNotFound) as damage:
            try:
                manifest = self._manifest(key, "manifest.backup.json")
            except (DamagedMemory, MemoryNotFound):
                raise damage from None
            logger.warning("manifest.json of %s is restored from its backup: %s", key.path, damage)
            self.storage.write(f"{_folder(key)}/manifest.json", seal(manifest))
            return manifest

    def publish(self, manifest: Manifest) -> None:
        """Writes the manifest: from then on the version exists. The same manifest may be published again.

        Raises `MemoryExists` if another was published for that version.
        """
        key = manifest.key
        if self._has(key.tenant, key.memory, key.version, "manifest.json") and self.read_manifest(key) != manifest:
            raise MemoryExists(manifest.memory)
        sealed = seal(manifest)
        self.storage.write(f"{_folder(key)}/manifest.backup.json", sealed)
        self.storage.write(f"{_folder(key)}/manifest.json", sealed)
        self.storage.delete(checkpoint_path(key))

    def restore_manifest(self, manifest: Manifest) -> None:
        """Writes the manifest of a published version again, whose files are gone or damaged."""
        for name in ("manifest.backup.json", "manifest.json"):
            self.storage.write(f"{_folder(manifest.key)}/{name}", seal(manifest))

    def finish_publishing(self, key: MemoryKey) -> bool:
        """Publishes a version whose manifest was written only once before the writer died, or lost since.

        Returns whether it did. Everything else was durable by then, so this is the version that was meant.
        """
        if self.failure(key) is not None:
            return False
        try:
            manifest = self._manifest(key, "manifest.backup.json")
        except (DamagedMemory, MemoryNotFound):
            return False
        self.publish(manifest)
        return True

    def write_source(self, key: MemoryKey, document: str, text: str) -> Document:
        """Keeps the document's text."""
        source = self.storage.write(source_path(key, document), text.encode())
        return Document(id=document, characters=len(text), source=source)

    def write_segment(
        self,
        path: str,
        shape: MemoryShape,
        parts: "Sequence[tuple[torch.Tensor, torch.Tensor]]",
        counts: Counts | None = None,
    ) -> StoredFile:
        """Keeps these keys and values, as `segments.write_slots` takes them, under `path`."""
        with self.storage.writer(path) as sink:
            write_slots(sink, shape, parts, counts)
        return sink.stored

    def read_segment(self, file: StoredFile) -> Segment:
        """Its windows, memory-mapped where the storage is local. Raises `DamagedFile` (or its `DamagedMemory`)."""
        return Segment(self.storage.read(file), file.path)

    def begin(self, key: MemoryKey, job: JobRecord) -> None:
        """Records that the version is being made."""
        self.storage.write(f"{_folder(key)}/job.json", job.model_dump_json(indent=1).encode())

    def fail(self, key: MemoryKey, error: str) -> None:
        """Records that making the version was given up."""
        failure = _Failure(error=error).model_dump_json(indent=1)
        self.storage.write(f"{_folder(key)}/failed.json", failure.encode())

    def job(self, key: MemoryKey) -> JobRecord | None:
        """What the version is made from, if that was recorded."""
        return self._read(key, "job.json", JobRecord)

    def failure(self, key: MemoryKey) -> str | None:
        """Why making the version was given up, if it was."""
        failure = self._read(key, "failed.json", _Failure)
        return failure.error if failure else None

    def discard(self, key: MemoryKey) -> None:
        """Deletes one version that never became ready."""
        self._delete_folder(_folder(key))

    def collect(self, tenant: str, memory: str, kept: Collection[str]) -> list[str]:
        """Deletes the versions that are not `kept`, and every file that no kept version refers to.

        Returns the versions deleted. A version ceases to exist before any file of it goes; one in the making is left
        alone. Raises `DamagedMemory`, and deletes nothing, if a kept version's manifest cannot be read: its files are
        not known.
        """
        versions = self.all_versions(tenant, memory)
        published = {*self.versions(tenant, memory)}
        referenced: set[str] = set()
        for version in published.intersection(kept):
            referenced |= {file.path for file in self.read_manifest(MemoryKey(tenant, memory, version)).files}
        gone = [version for version in versions if version not in kept]
        for version in gone:
            folder = _folder(MemoryKey(tenant, memory, version))
            for name in ("manifest.backup.json", "manifest.json"):
                self.storage.delete(f"{folder}/{name}")
        for version in {*gone, *published}:
            folder = _folder(MemoryKey(tenant, memory, version))
            needed = referenced | ({f"{folder}/{name}" for name in _ABOUT} if version in kept else set())
            for path in self.storage.files(folder):
                if path not in needed:
                    self.storage.delete(path)
            if not self.storage.files(folder):
                self.storage.delete_folder(folder)
        return gone

    def delete(self, tenant: str, memory: str, request: str | None = None) -> None:
        """Deletes the memory; a deletion that is cut short is as good as done, and `sweep` finishes it.

        `request`, as `new_request` makes it, names the call: `was_deleted_by` knows it for an hour at least.
        """
        self.storage.write(self._deleted_marker(tenant, memory), (request or "").encode())
        for version in self.storage.folders(f"{tenant}/{memory}"):
            self._delete_folder(f"{tenant}/{memory}/{version}")
        if request:
            self._remember_deletion(tenant, request)
        self._delete_folder(f"{tenant}/{memory}")

    def was_deleted_by(self, tenant: str, request: str) -> bool:
        """Whether this request deleted a memory of the tenant, of whatever name."""
        return any(path.endswith(f"-{request}") for path in self.storage.files(_deletions(tenant)))

    def _remember_deletion(self, tenant: str, request: str) -> None:
        folder, now = _deletions(tenant), time.time()
        for path in self.storage.files(folder):
            if float(path.rpartition("/")[2].partition("-")[0]) < now - _REMEMBERED_S:
                self.storage.delete(path)
        self.storage.write(f"{folder}/{now:.0f}-{request}", b"")

    def is_deleted(self, tenant: str, memory: str) -> bool:
        """Whether a deletion began that has not finished."""
        return self.storage.exists(self._deleted_marker(tenant, memory))

    def sweep(self) -> None:
        """Finishes the deletions that were cut short, and removes what writers that died left a day ago or more."""
        if self.storage.is_local:  # object stores keep nothing of an upload that was not completed
            self.storage.sweep_torn(older_than_s=_TORN_S)
        for tenant in self.tenants():
            for memory in self._list_ids(tenant):
                if self.is_deleted(tenant, memory):
                    marker = self.storage.read_unverified(self._deleted_marker(tenant, memory)).to_pybytes()
                    request = marker.decode(errors="replace")
                    self.delete(tenant, memory, request if _REQUEST.fullmatch(request) else None)

    def _delete_folder(self, path: str) -> None:
        """Deletes it also while a worker, who does not know yet that its job has ended, puts a file into it."""
        for _ in range(_DELETE_ATTEMPTS - 1):
            try:
                return self.storage.delete_folder(path)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
        self.storage.delete_folder(path)

    def _deleted_marker(self, tenant: str, memory: str) -> str:
        return f"{_join(tenant=tenant, memory=memory)}/deleted"

    def _manifest(self, key: MemoryKey, name: str) -> Manifest:
        path = f"{_folder(key)}/{name}"
        try:
            data = self.storage.read_unverified(path).to_pybytes()
        except FileNotFoundError:
            raise MemoryNotFound(key.memory) from None
        manifest = open_manifest(data, path, f"{self.storage.root}/{key.tenant}/{key.memory}/*/source/*.txt")
        if manifest.key != key:
            raise DamagedMemory(path, "is the manifest of another memory")
        return manifest

    def _list_ids(self, path: str) -> list[str]:
        return [name for name in self.storage.folders(path) if _ID.fullmatch(name)]

    def _has(self, tenant: str, memory: str, version: str, name: str) -> bool:
        return self.storage.exists(f"{tenant}/{memory}/{version}/{name}")

    def _read(self, key: MemoryKey, name: str, model: type[_T]) -> _T | None:
        path = f"{_folder(key)}/{name}"
        try:
            return model.model_validate_json(self.storage.read_unverified(path).to_pybytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DamagedMemory(path, f"is not a {name} of this version: {_describe_first(error)}") from error


class _Failure(BaseModel):
    error: str


def _deletions(tenant: str) -> str:
    return f"{_join(tenant=tenant)}/.deleted"  # no id begins with a dot


def _folder(key: MemoryKey) -> str:
    return _join(tenant=key.tenant, memory=key.memory, version=key.version)


def _join(**ids: str) -> str:
    """These as a path. Callers have checked what users name; but archives and job files are read, too.

    This is the line that keeps each tenant's files apart, whoever brought an id: a '/' in one would reach into
    another's folder.
    """
    return "/".join(check_id(id, what) for what, id in ids.items())


def seal(manifest: Manifest) -> bytes:
    """The manifest as JSON, with its own digest beside it: nothing else vouches for this file."""
    content = manifest.model_dump(mode="json")
    return json.dumps({"sha256": _canonical_digest(content), "manifest": content}, indent=1).encode()


def open_manifest(data: bytes, path: str, texts: str = "FILE...") -> Manifest:
    """What `seal` made. Raises `DamagedMemory` naming `path` for anything else; `texts` are what an older one is of."""
    try:
        envelope = json.loads(data)
        digest, content = envelope["sha256"], envelope["manifest"]
        found = content["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedMemory(path, f"is not a manifest ({type(error).__name__}: {error})") from error
    if digest != _canonical_digest(content):
        raise DamagedMemory(path, "does not match its SHA-256")
    if found != FORMAT:
        id = shlex.quote(str(content.get("memory")))
        anew = f"make the memory anew from its texts: memorag memorize --id {id} {texts}"
        raise DamagedMemory(path, f"has format version {found!r}, and this server reads {FORMAT}; {anew}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise DamagedMemory(path, f"is not a manifest: {_describe_first(error)}") from error


def _canonical_digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _describe_first(error: ValidationError) -> str:
    detail = error.errors()[0]
    return f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
