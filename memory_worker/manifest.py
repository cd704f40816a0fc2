"""The manifest: what one immutable version of a memory is made of. It is published last, and names the rest."""

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(_Part):
    """A durable file of this version, or of an earlier one that this version still uses."""

    path: str  # relative to the storage root
    size: int  # bytes
    digest: str  # SHA-256, hexadecimal


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
    dtype: str  # bfloat16, float16 or float32

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
