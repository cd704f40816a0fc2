"""The manifest: what one immutable version of a memory is made of. It is published last, and names the rest."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.planning.costs import MemoryKind
from cluster.storage.durable import StoredFile

FORMAT = 3

SlotDtype = Literal["bfloat16", "float16", "float32"]


def now() -> str:
    """The time as manifests and jobs record it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class MemoryKey:
    """One immutable version of one memory."""

    tenant: str
    memory: str
    version: str

    @property
    def path(self) -> str:
        """Its folder, relative to the storage root."""
        return f"{self.tenant}/{self.memory}/{self.version}"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Document(_Part):
    """One document of a memory, ready or to be made: its text is durable."""

    id: str
    characters: int = Field(ge=0)
    source: StoredFile


class JobRecord(_Part):
    """What a version is being made from: written as `job.json` when the work begins, so that it can be resumed.

    `documents` are encoded and indexed; all others of the version `base` are taken over as they are.
    """

    id: str = Field(default_factory=lambda: uuid.uuid4().hex, description="tells a repeated call from a second job")
    kind: Literal["create", "put", "repair"] = "create"
    base: str | None = Field(None, description="the version that is changed; none when a memory is created")
    documents: tuple[Document, ...]
    memory_kind: MemoryKind = "beacon"
    ratio: int
    language: str
    title: str | None = None
    tags: tuple[str, ...] = ()
    created: str = Field(default_factory=now)

    @property
    def bytes(self) -> int:
        """Bytes of the texts."""
        return sum(document.source.size for document in self.documents)


class SegmentEntry(_Part):
    """A stretch of one document, encoded after the head alone. A document longer than a prompt can hold has several."""

    tokens: int = Field(gt=0)
    slots: int = Field(gt=0)
    files: tuple[StoredFile, ...]  # in slot order, whole windows each
    dropped: float = Field(0.0, ge=0, le=1, description="share of its pairs' scores that was dropped")
    head_budgets: bool = Field(False, description="whether heads of a layer share slots, each with its own number")


class DocumentEntry(Document):
    """One document of a ready memory."""

    segments: tuple[SegmentEntry, ...]
    passages: StoredFile
    passage_count: int = Field(ge=0)

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def slots(self) -> int:
        return sum(segment.slots for segment in self.segments)

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All that is stored of it."""
        return self.source, self.passages, *(file for segment in self.segments for file in segment.files)


class MemoryShape(_Part):
    """What one slot is: the KV shape of the memory model."""

    layers: int = Field(gt=0, lt=2**20)
    kv_heads: int = Field(gt=0, lt=2**20)
    head_dim: int = Field(gt=0, lt=2**20)
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
    tags: tuple[str, ...] = ()
    kind: MemoryKind = "beacon"
    model: str  # as configured
    fingerprint: str  # of the memory model's weights and the kind's recipe (`models.fingerprint.fingerprint_of`)
    ratio: int = Field(gt=0)  # tokens for each slot; of a gist, at least
    language: str
    shape: MemoryShape
    head_tokens: tuple[int, ...] = Field(description="token ids of the head")
    head: StoredFile  # the head's segment
    documents: tuple[DocumentEntry, ...]

    @property
    def key(self) -> MemoryKey:
        return MemoryKey(self.tenant, self.memory, self.version)

    @property
    def segments(self) -> tuple[SegmentEntry, ...]:
        """Of all documents, in order: what `SegmentRange` counts in."""
        return tuple(segment for document in self.documents for segment in document.segments)

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Everything but the manifest that the version is made of, wherever it lies."""
        return self.head, *(file for document in self.documents for file in document.files)

    @property
    def passage_count(self) -> int:
        return sum(document.passage_count for document in self.documents)

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
    def dropped(self) -> float | None:
        """Of a pruned memory, the share of the pairs' scores that was dropped: token by token, over all segments."""
        if self.kind != "pruned":
            return None
        return sum(segment.tokens * segment.dropped for segment in self.segments) / max(1, self.tokens)

    @property
    def head_budgets(self) -> bool | None:
        """Of a pruned memory, whether each head keeps a number of pairs of its own, or all equally many.

        What is shorter than a block of slots is kept alike in any case.
        """
        return any(segment.head_budgets for segment in self.segments) if self.kind == "pruned" else None

    @property
    def bytes(self) -> int:
        """Bytes of the memory's slots."""
        return self.slots * self.shape.slot_bytes
