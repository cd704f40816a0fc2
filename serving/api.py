"""The shapes of HTTP requests and responses: what the OpenAPI document shows and the Router speaks."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.planning.costs import MemoryKind

Task = Literal["memorag", "memory", "rag", "summarize", "full", "hyde", "rewrite"]
Language = Literal["en", "zh"]
Status = Literal["memorizing", "ready", "failed"]
Id = Annotated[str, Field(description="letters, digits, '.', '_' and '-'; not starting with a dot", max_length=128)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DocumentIn(_Request):
    """A document to memorize."""

    id: Id | None = Field(None, description="doc-1, doc-2, … where it is left out")
    text: str


class CreateMemory(_Request):
    """Documents that become one memory."""

    id: Id | None = Field(None, description="made from the title, or at random, where it is left out")
    title: str | None = Field(None, max_length=512)
    tags: list[Id] = Field([], max_length=32, description="questions may be asked of all memories with a tag")
    kind: MemoryKind | None = Field(
        None,
        description="beacon: compressed by trained beacons; full: a slot for every token; gist: what the model writes "
        "down of every 4096 tokens; pruned: of the slots of full those that repeating the text needs most. "
        "Left out: the profile's, else beacon where the model has beacon weights, else pruned",
    )
    ratio: int | None = Field(
        None,
        description="tokens for each slot: exactly for beacon, where it divides the memory model's window, at least "
        "for gist; 2, 3, 4, 8 or 16 for pruned; full takes 1 only",
    )
    documents: list[DocumentIn] = Field(min_length=1)


class PutDocument(_Request):
    """The text of a document that is added to a memory, or replaces the one of that id."""

    text: str


class Turn(_Request):
    """What was said before a question."""

    role: Literal["user", "assistant"]
    content: str


class Question(_Request):
    """A question about one memory.

    With `messages`, the conversation before it, it is first made whole: written so that it stands alone.
    """

    question: str = Field(min_length=1)
    messages: list[Turn] = Field([], max_length=1000, description="the conversation before the question, oldest first")
    task: Task = Field(
        "memorag",
        description="memorag: clues, then passages; memory: no passages; rag: no clues; to compare with, without "
        "memory: full: the whole text in the prompt; hyde, rewrite: the generator's drafts as clues",
    )
    max_tokens: int | None = Field(None, ge=1, description="tokens of the answer at most")
    short: bool = Field(False, description="answer with a phrase and no citations, as benchmarks expect")
    stream: bool = Field(False, description="server-sent events clue, passage, token and done")
    language: Language | None = Field(None, description="of the prompts; the text's own where it is left out")
    system: str | None = Field(None, max_length=16_384, description="instructions of your own for the answer")
    temperature: float = Field(0.0, ge=0, le=2, description="0 always takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="of the probability, the share that is drawn from")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="the same answer again where temperature is not 0"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=16, description="texts that end the answer")


class QuestionToMany(Question):
    """A question about several memories at once: those named, and those with the tag."""

    memories: list[Id] = Field([], max_length=256, description="ids of memories")
    tag: Id | None = None


class CluesQuery(_Request):
    """A question whose clues are wanted."""

    question: str = Field(min_length=1)
    language: Language | None = None


class PassagesQuery(_Request):
    """A text to search the memory's passages with."""

    question: str = Field(min_length=1)


class SummaryQuery(_Request):
    """How to summarize a memory."""

    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    language: Language | None = None


class DocumentOut(BaseModel):
    id: str
    characters: int
    tokens: int


class ProgressOut(BaseModel):
    """How far a memory in the making is."""

    status: Status
    state: Literal["queued", "running"]
    done_tokens: int
    total_tokens: int
    tokens_per_second: float
    seconds_left: float | None


class JobOut(BaseModel):
    """A version in the making: how far it is."""

    kind: Literal["create", "put", "repair"]
    state: Literal["queued", "running"]
    version: str
    documents: list[str]
    done_tokens: int
    total_tokens: int


class FailedChange(BaseModel):
    """A change that came to nothing; the memory is as it was before."""

    kind: Literal["create", "put", "repair"]
    version: str  # that was not made
    error: str


class MemoryOut(BaseModel):
    """One memory. `job` is what is being made of it now; `error` is why making it failed.

    `failed_change` is the last change of a ready memory where that failed, until one succeeds.
    """

    id: str
    title: str | None = None
    tags: list[str] = []
    status: Status
    version: str
    kind: MemoryKind
    ratio: int
    slots: int
    tokens: int
    passages: int
    bytes: int
    dropped: float | None = Field(
        None, description="of a pruned memory: share of the attention that repeating the text pays, which was dropped"
    )
    head_budgets: bool | None = Field(
        None,
        description="of a pruned memory: whether the heads of a layer share its slots, each keeping what it needs; "
        "false where the engine cannot read that, and all keep equally many",
    )
    documents: list[DocumentOut]
    created: str
    job: JobOut | None = None
    error: str | None = None
    failed_change: FailedChange | None = None


class MemoryList(BaseModel):
    memories: list[MemoryOut]
    next_cursor: str | None


class ClueOut(BaseModel):
    kind: Literal["span", "question", "draft", "key_point"]
    text: str


class PassageOut(BaseModel):
    """`text` is exactly the document's characters `start` to `end`; an answer cites its first passage as [1]."""

    memory: str
    document: str
    start: int
    end: int
    text: str
    score: float


class CitationOut(BaseModel):
    """`[n]` in the answer means the n-th of its passages, which these name."""

    n: int
    memory: str
    document: str
    start: int
    end: int


class EvidenceOut(PassageOut):
    """A sentence that supports question and answer, chosen by the embedder, whatever the model wrote."""


class Usage(BaseModel):
    """Tokens read and written; recall counts the memory's slots once for each kind of clue."""

    recall_prompt_tokens: int = 0
    recall_completion_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Timings(BaseModel):
    """Milliseconds. Searching overlaps with recalling: `retrieve` is what it took beyond the last clue."""

    recall: float = 0.0
    retrieve: float = 0.0
    generate: float = 0.0
    total: float = 0.0


class MemoryVersion(BaseModel):
    """A version that was asked."""

    id: str
    version: str


class Answer(BaseModel):
    """`memory` and `version` are null where several memories were asked; `memories` names all."""

    memory: str | None
    version: str | None
    memories: list[MemoryVersion]
    task: Task
    question: str = Field("", description="as it was answered: made whole where a conversation stood before it")
    answer: str
    finish_reason: str = Field("stop", description="stop, or length where max_tokens or the window ended it")
    citations: list[CitationOut]
    evidence: list[EvidenceOut]
    clues: list[ClueOut]
    passages: list[PassageOut]
    degraded: list[str]
    usage: Usage
    timings_ms: Timings


class CluesOut(BaseModel):
    memory: str
    version: str
    clues: list[ClueOut]
    degraded: list[str]
    usage: Usage
    timings_ms: Timings


class PassagesOut(BaseModel):
    memory: str
    version: str
    passages: list[PassageOut]
    timings_ms: Timings


class UsageOut(BaseModel):
    """What the caller's tenant has, and may have; null is unlimited."""

    tenant: str
    memories: int
    tokens: int
    bytes: int
    jobs: int
    quota: dict[str, int | None]


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    """Every pool answers; how many requests each engine is working on."""

    status: Literal["ok"]
    running: dict[str, int]


class ProblemOut(BaseModel):
    """RFC 9457 problem details; members beyond these may follow."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Event(BaseModel):
    """One server-sent event on its way from the Router."""

    name: Literal["clue", "passage", "token", "done", "error", "progress", "ready", "failed"]
    data: dict[str, Any]
