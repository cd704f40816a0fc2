"""What goes in and out of the Generator."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Source:
    """A passage given to the generator; its place in the request, from 1, is the `n` that answers cite."""

    document: str
    start: int  # characters
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """To `Generator.generate`. Streams `cluster.messages.TextDelta`s, then one `Generation`."""

    task: Literal["answer", "summarize"]
    question: str  # empty for summarize
    sources: tuple[Source, ...]
    language: Literal["en", "zh"]
    max_tokens: int | None  # None takes the configured default


@dataclass(frozen=True, slots=True)
class Citation:
    """`[n]` in the answer, resolved: the passage's document and character offsets."""

    n: int
    document: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Generation:
    """The end of a generated answer."""

    text: str
    citations: tuple[Citation, ...]
    sources_used: int  # how many of the request's sources fitted the context window, from the first
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
