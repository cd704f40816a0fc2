"""What goes in and out of the retrieval pool's deployments."""

from dataclasses import dataclass

import numpy as np

from cluster.storage.durable import StoredFile


@dataclass(frozen=True, slots=True)
class Embeddings:
    """From `Embedder.embed`: one row per text, in order."""

    dense: np.ndarray  # float32 [texts, dimension], rows of unit length
    sparse: list[dict[int, float]] | None  # weight by token id, where the model has such


@dataclass(frozen=True, slots=True)
class EmbedderDescription:
    """From `Embedder.describe`: the model."""

    model: str
    dimension: int
    has_sparse: bool
    max_tokens: int  # of one text; what is longer is cut


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrieval chunk: `text` is exactly the source's characters `start` to `end`."""

    id: int  # its row in the searched `Index`, from 0: parts one after another
    memory: str
    document: str
    start: int  # characters (Unicode code points)
    end: int
    text: str
    tokens: int  # by the embedder's tokenizer


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage found, with its score: of similarity and words in one ranking, or the fused score of several."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """From `Retriever.search`, for one text: the passages that fit it, and how far the passages say what it says."""

    hits: tuple[Hit, ...]  # best first
    grounding: float  # 0 to 1: the most of the text's words, rare ones counting more, that one passage holds


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """To `Retriever.index`: cut and embed a document, whose text is durable, into the passage file at `path`."""

    source: StoredFile  # the text, UTF-8
    path: str  # relative to the storage root


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """From `Retriever.index`, after each batch."""

    done_passages: int
    total_passages: int


@dataclass(frozen=True, slots=True)
class IndexedDocument:
    """The last item from `Retriever.index`: the passage file, vectors included."""

    passages: StoredFile
    passage_count: int


@dataclass(frozen=True, slots=True)
class IndexPart:
    """One document of an `Index`."""

    memory: str
    document: str
    passages: StoredFile


@dataclass(frozen=True, slots=True)
class Index:
    """What one search runs over: the documents of one version, or of several memories of one tenant.

    `name` stands for exactly these parts and never for others; where it is empty they are known by themselves. Where
    `parts` is none, those are meant that the Retriever has open under the name.
    """

    parts: tuple[IndexPart, ...] | None
    name: str = ""

    @property
    def by_name(self) -> "Index":
        """The same without its parts, for a Retriever that has them open."""
        return Index(None, self.name) if self.name else self


@dataclass(frozen=True, slots=True)
class EvidenceRequest:
    """To `Retriever.evidence`: the sentences of these passages that best support question and answer."""

    index: Index
    passages: tuple[int, ...]  # ids
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """A sentence of a passage: `text` is exactly the source's characters `start` to `end`."""

    memory: str
    document: str
    start: int
    end: int
    text: str
    score: float  # cosine similarity
