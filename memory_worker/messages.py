"""What goes in and out of the memory pool's deployments and actors."""

from dataclasses import dataclass
from typing import Literal

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
    max_tokens: int


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
