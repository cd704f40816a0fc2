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


class EmbedderFailed(RetrievalError):
    """The embedder's vectors cannot be searched: they are not finite."""

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(
            f"embedder {model!r} gave a vector that is not finite; set retrieval.embedder.dtype to bfloat16 or float32"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (EmbedderFailed, (self.model,))


class DamagedIndex(RetrievalError):
    """A document's passage file cannot be searched; the caller has its passages made again from the text."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"passage file {path!r} {reason}; its passages are made again from the document's text")

    def __reduce__(self) -> tuple[Any, ...]:
        return (DamagedIndex, (self.path, self.reason))
