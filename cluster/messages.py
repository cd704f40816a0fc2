"""How a text generator is asked, and what it streams: pieces of text, then what they cost."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, in OpenAI's terms; as it stands, always the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()  # a text that ends the generation, and is not part of it


LIKELIEST = Sampling()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of a text that is being generated."""

    text: str
    tokens: int = 0  # generated since the piece before


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a generated text, with what it cost."""

    prompt_tokens: int  # memory slots included
    completion_tokens: int
    reason: str  # vLLM's finish reason: stop, length, …


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What one engine is doing."""

    requests: int  # being generated or waiting for it, as the replica counts
    working: bool  # whether the engine itself has anything to do
    alive: bool
