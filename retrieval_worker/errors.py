"""What can go wrong in retrieval that its callers can act on."""

from cluster.errors import ExpectedError
from cluster.storage.durable import DamagedFile


class EmbedderUnavailable(ExpectedError):
    """The configured embedder cannot be loaded; the message says what to change."""

    model: str
    reason: str
    template = (
        "embedder {model!r} cannot be loaded: {reason}; set retrieval.embedder.model to a complete checkpoint, or "
        "retrieval.embedder.kind to minilm"
    )


class EmbedderFailed(ExpectedError):
    """The embedder's vectors cannot be searched: they are not finite."""

    model: str
    template = (
        "embedder {model!r} gave a vector that is not finite; set retrieval.embedder.dtype to bfloat16 or float32"
    )


class DamagedIndex(DamagedFile):
    """A document's passage file cannot be searched; the caller has its passages made again from the text."""

    template = "passage file {path!r} {reason}; its passages are made again from the document's text"
