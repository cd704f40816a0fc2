"""What can go wrong in retrieval that its callers can act on."""

from typing import Any


class RetrievalError(Exception):
    """Base of this room's errors."""


class EmbedderUnavailable(RetrievalError):
    """The configured embedder cannot be loaded; the message says what to change."""

    def __init__(self, model: str, reason: str) -> None:
        self.model = model
        self.reason = reason
        super().__init__(
            f"embedder {model!r} cannot be loaded: {reason}; "
            "set retrieval.embedder.model to a complete checkpoint, or retrieval.embedder.kind to minilm"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (EmbedderUnavailable, (self.model, self.reason))


class DamagedIndex(RetrievalError):
    """The passages an index was made from are missing or damaged, so that it cannot be rebuilt."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"passages file {path!r} {reason}; memorize the documents again")

    def __reduce__(self) -> tuple[Any, ...]:
        return (DamagedIndex, (self.path, self.reason))
