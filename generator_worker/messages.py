"""What goes in and out of the Generator."""

from dataclasses import dataclass
from typing import Literal

# hyde and rewrite take no sources: they write what to search with. full takes whole documents.
GenerateTask = Literal["answer", "summarize", "full", "hyde", "rewrite"]


@dataclass(frozen=True, slots=True)
class Source:
    """A text given to the generator: a passage, or for `full` a whole document."""

    text: str
    score: float = 0.0  # the lowest are dropped first where not all fit the context window


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """To `Generator.generate`. Streams `cluster.messages.TextDelta`s, then one `Generation`."""

    task: GenerateTask
    question: str  # empty for summarize
    sources: tuple[Source, ...]
    language: Literal["en", "zh"]
    max_tokens: int | None  # None takes the configured default
    cache_salt: str  # of the tenant: one tenant's prompts must not be seen in another's response times
    short: bool = False  # a phrase without citations
    stream: bool = True  # False sends no TextDeltas, only the Generation: fewer messages where nobody watches


@dataclass(frozen=True, slots=True)
class Generation:
    """The end of a generated answer. `text` is what the deltas add up to, and may be empty."""

    text: str
    sources: tuple[int, ...]  # indices, ascending, of the request's sources that fitted the context window
    citations: tuple[int, ...]  # each n of `[n]` in the text, once: the n-th of `sources`, from 1
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str  # stop, or length where max_tokens or the context window ended it
    cut: bool = False  # of a whole text, the middle was left out
