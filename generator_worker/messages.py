"""What goes in and out of the Generator."""

from dataclasses import dataclass
from typing import Literal

from cluster.messages import LIKELIEST, Sampling

# hyde and rewrite take no sources: they write what to search with. full takes whole documents, whole a conversation.
GenerateTask = Literal["answer", "summarize", "full", "hyde", "rewrite", "whole"]


@dataclass(frozen=True, slots=True)
class Source:
    """A text given to the generator: a passage, for `full` a whole document, for `whole` one turn of a conversation."""

    text: str
    score: float = 0.0  # the lowest are dropped first where not all fit the context window


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """To `Generator.generate`. Streams `SourcesRead`, `cluster.messages.TextDelta`s, then one `Generation`."""

    task: GenerateTask
    question: str  # empty for summarize
    sources: tuple[Source, ...]
    language: Literal["en", "zh"]
    max_tokens: int | None  # None takes the configured default
    cache_salt: str  # of the tenant: one tenant's prompts must not be seen in another's response times
    short: bool = False  # a phrase without citations
    system: str | None = None  # the caller's own instructions, put before ours
    sampling: Sampling = LIKELIEST
    stream: bool = True  # False sends no TextDeltas: fewer messages where nobody watches


@dataclass(frozen=True, slots=True)
class SourcesRead:
    """What the prompt holds, told once the engine has read it: the first passage there is cited as [1]."""

    sources: tuple[int, ...]  # indices, ascending, of the request's sources that fitted the context window


@dataclass(frozen=True, slots=True)
class Generation:
    """The end of a generated answer. `text` is what the deltas add up to, and may be empty."""

    text: str
    citations: tuple[int, ...]  # each n of `[n]` in the text, once: the n-th of the sources read, from 1
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str  # stop, or length where max_tokens or the context window ended it
    cut: bool = False  # of a whole text, the middle was left out
