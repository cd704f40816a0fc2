"""What goes in and out of the memory pool's deployments and actors."""

from dataclasses import dataclass
from typing import Literal

from memory_worker.manifest import DocumentEntry, FileEntry, JobRecord, Manifest, MemoryShape

ClueKind = Literal["span", "question", "draft", "key_point"]
Language = Literal["en", "zh"]


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


@dataclass(frozen=True, slots=True)
class DocumentSource:
    """A document's text, already durable, waiting to be memorized."""

    id: str
    path: str  # UTF-8 text file, relative to the storage root


@dataclass(frozen=True, slots=True)
class MemorizeRequest:
    """To `Memorizer.memorize`: encode the documents' segments into the version's folder."""

    key: MemoryKey
    documents: tuple[DocumentSource, ...]
    ratio: int
    language: Language  # of the head


@dataclass(frozen=True, slots=True)
class MemorizeProgress:
    """From `Memorizer.memorize`, after each group of windows."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class MemorizeResult:
    """From `Memorizer.memorize`, last: all that the manifest has to know of the encoding."""

    model: str  # as configured
    fingerprint: str
    shape: MemoryShape
    head_tokens: tuple[int, ...]
    head: FileEntry
    documents: tuple[DocumentEntry, ...]  # in the order of the request


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """From the `Catalog`: one memory as it stands."""

    tenant: str
    memory: str
    version: str  # the newest ready one; where none is ready, the one being made or failed
    status: Literal["memorizing", "ready", "failed"]
    created: str  # ISO 8601, UTC
    revision: int  # another number after every change
    manifest: Manifest | None = None  # when ready
    job: JobRecord | None = None  # what it is being made from, until it is ready
    done_tokens: int = 0  # of the job
    total_tokens: int = 0  # 0 until known
    error: str | None = None  # when failed

    @property
    def key(self) -> "MemoryKey":
        return MemoryKey(self.tenant, self.memory, self.version)


@dataclass(frozen=True, slots=True)
class MemorizerDescription:
    """From `Memorizer.describe`: the memory model that is loaded."""

    model: str  # as configured
    fingerprint: str
    window: int  # tokens
    ratios: tuple[int, ...]  # that divide the window
    shape: MemoryShape


@dataclass(frozen=True, slots=True)
class RecallRequest:
    """To `Recaller.recall`: clues of these kinds for one question, from one version of a memory."""

    key: MemoryKey
    slots: int  # of the whole memory, head included
    question: str  # empty for key points
    kinds: tuple[ClueKind, ...]
    language: Language


@dataclass(frozen=True, slots=True)
class MemoryAnswerRequest:
    """To `Recaller.answer`: an answer from memory alone."""

    key: MemoryKey
    slots: int
    question: str
    language: Language
    max_tokens: int | None  # None takes the configured default


@dataclass(frozen=True, slots=True)
class Clue:
    """One line recalled from memory."""

    kind: ClueKind
    text: str


@dataclass(frozen=True, slots=True)
class RecallUsage:
    """The end of a recall: what its generations cost together."""

    prompt_tokens: int  # memory slots counted once per kind
    completion_tokens: int
