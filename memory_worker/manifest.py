"""The manifest: what one immutable version of a memory is made of. It is published last, and names the rest."""

import uuid
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.storage import StoredFile

FORMAT = 1

SlotDtype = Literal["bfloat16", "float16", "float32"]


def now() -> str:
    """The time as manifests and jobs record it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(_Part):
    """A durable file of this version, or of an earlier one that this version still uses."""

    path: str  # relative to the storage root
    size: int  # bytes
    digest: str  # SHA-256, hexadecimal

    @classmethod
    def of(cls, file: StoredFile) -> "FileEntry":
        """The entry of a file that storage has just written."""
        return cls(path=file.path, size=file.size, digest=file.digest)

    @property
    def stored(self) -> StoredFile:
        """The record that storage verifies it by."""
        return StoredFile(self.path, self.size, self.digest)


class JobDocument(_Part):
    """One document to memorize; its text is the version's `source/<id>.txt`."""

    id: str
    characters: int


class JobRecord(_Part):
    """What a version is being made from: written as `job.json` when the work begins, so that it can be resumed."""

    id: str = Field(default_factory=lambda: uuid.uuid4().hex, description="tells a repeated call from a second job")
    documents: tuple[JobDocument, ...]
    ratio: int
    language: str
    title: str | None = None
    created: str = Field(default_factory=now)


class DocumentEntry(_Part):
    """One document of the memory."""

    id: str
    characters: int
    tokens: int
    slots: int
    source: FileEntry
    segment: FileEntry


class MemoryShape(_Part):
    """What one slot is: the KV shape of the memory model."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: SlotDtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)


class Manifest(_Part):
    """One version of one memory."""

    format: int = FORMAT
    tenant: str
    memory: str
    version: str
    parent: str | None = None
    created: str  # ISO 8601, UTC
    title: str | None = None
    kind: str = "beacon"
    model: str  # as configured
    fingerprint: str  # of the memory model's weights and recipe
    ratio: int
    language: str
    shape: MemoryShape
    head_tokens: tuple[int, ...] = Field(description="token ids of the head")
    head: FileEntry  # the head's segment
    documents: tuple[DocumentEntry, ...]
    passages: FileEntry
    passage_count: int
    index: tuple[FileEntry, ...]

    @property
    def head_slots(self) -> int:
        return len(self.head_tokens)

    @property
    def slots(self) -> int:
        """Slots of the whole memory: the head's and every document's."""
        return self.head_slots + sum(document.slots for document in self.documents)

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.documents)

    @property
    def bytes(self) -> int:
        """Bytes of the memory's slots."""
        return self.slots * self.shape.slot_bytes
