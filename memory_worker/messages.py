"""What goes in and out of the memory pool's deployments and actors."""

import re
from dataclasses import dataclass
from typing import Literal

from cluster.messages import LIKELIEST, Sampling
from cluster.planning.costs import MemoryKind
from cluster.storage.durable import StoredFile
from memory_worker.errors import UnfitRatio, UnsupportedKind
from memory_worker.manifest import Document, JobRecord, MemoryKey, MemoryShape, SegmentEntry

ClueKind = Literal["span", "question", "draft", "key_point"]
Language = Literal["en", "zh"]

_RANGE = re.compile(r"([^/+:]+)/([^/+:]+)/([^/+:]+):(\d{1,9})-(\d{1,9})")


@dataclass(frozen=True, slots=True)
class SegmentRange:
    """Consecutive segments of one version, counted over all its documents in order."""

    key: MemoryKey
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Segments read together behind one head, that of the first range's version: as many as one prompt holds."""

    ranges: tuple[SegmentRange, ...]
    slots: int  # head included

    @property
    def name(self) -> str:
        """Names exactly these segments, such as `acme/book/v000001-5f3a9c01:0-3+acme/log/v000002-…:0-1`."""
        return "+".join(f"{r.key.path}:{r.first}-{r.end}" for r in self.ranges)

    @classmethod
    def parse(cls, name: str, slots: int) -> "SegmentGroup":
        """The group of that `name`. Raises `ValueError` for a text that names none."""
        ranges = []
        for part in name.split("+"):
            if not (match := _RANGE.fullmatch(part)):
                raise ValueError(f"{name[:200]!r} does not name segments as tenant/memory/version:first-end")
            tenant, memory, version, first, end = match.groups()
            ranges.append(SegmentRange(MemoryKey(tenant, memory, version), int(first), int(end)))
        return cls(tuple(ranges), slots)


@dataclass(frozen=True, slots=True)
class MemorizeRequest:
    """To `Memorizer.memorize`: encode the documents' segments into the version's folder."""

    key: MemoryKey
    documents: tuple[Document, ...]
    ratio: int
    language: Language  # of the head
    head: StoredFile | None = None  # of the version that is changed: read and used as it is; none makes and writes one
    kind: MemoryKind = "beacon"


@dataclass(frozen=True, slots=True)
class MemorizeProgress:
    """From `Memorizer.memorize`, after each group of windows."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class MemorizeResult:
    """From `Memorizer.memorize`, last: all that the manifest has to know of the encoding."""

    model: str  # as configured
    fingerprint: str
    shape: MemoryShape
    head_tokens: tuple[int, ...]
    head: StoredFile
    segments: tuple[tuple[SegmentEntry, ...], ...]  # of each document, in the order of the request


@dataclass(frozen=True, slots=True)
class Reservation:
    """From `Catalog.reserve`: where the sources of a version that is to be made are put, before its job begins."""

    key: MemoryKey
    base: MemoryKey | None  # the version that is changed; none when a memory is created


@dataclass(frozen=True, slots=True)
class ReadLease:
    """From `Catalog.read`: the present version of a memory, all of whose files stay for so long from then on."""

    key: MemoryKey
    seconds: float


@dataclass(frozen=True, slots=True)
class Job:
    """From the `Catalog`: a version in the making."""

    key: MemoryKey
    record: JobRecord
    state: Literal["queued", "running"] = "queued"
    done_tokens: int = 0
    total_tokens: int = 0  # 0 until known

    @property
    def base(self) -> MemoryKey | None:
        """The version that is changed; none when a memory is created."""
        base = self.record.base
        return MemoryKey(self.key.tenant, self.key.memory, base) if base else None


@dataclass(frozen=True, slots=True)
class FailedChange:
    """A change that came to nothing: the memory is as it was before."""

    key: MemoryKey  # the version that was not made
    kind: Literal["create", "put", "repair"]
    error: str


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """From the `Catalog`: one memory as it stands. What is in its version, the manifest says, which is in storage."""

    tenant: str
    memory: str
    version: str  # the newest ready one; where none is ready, the one being made or failed
    status: Literal["memorizing", "ready", "failed"]
    created: str  # ISO 8601, UTC
    revision: int  # another number after every change
    job: Job | None = None  # what is being made of it now; a ready memory may have one too
    error: str | None = None  # why making it failed, where no version is ready
    failed_change: FailedChange | None = None  # the last change of a ready memory, if it failed, until one succeeds

    @property
    def key(self) -> MemoryKey:
        return MemoryKey(self.tenant, self.memory, self.version)


@dataclass(frozen=True, slots=True)
class CatalogTotals:
    """From `Catalog.totals`: what all tenants have together."""

    memories: int  # that are ready
    slots: int  # of these
    tokens: int  # of these
    running_jobs: int
    waiting_jobs: int
    job_tokens: int  # of the jobs that know how many they have
    done_tokens: int  # of these
    reads: int  # versions handed to readers since the catalog started: each question reads one or more


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """From the `Catalog`: what one tenant has, jobs under way counted in."""

    memories: int
    tokens: int
    bytes: int  # of slots, and of the texts of jobs
    jobs: int  # queued or running


@dataclass(frozen=True, slots=True)
class KindDescription:
    """A kind of memory that a Memorizer can make."""

    window: int  # tokens that become slots together
    ratios: tuple[int, ...]  # tokens for each slot that it may have


@dataclass(frozen=True, slots=True)
class MemorizerDescription:
    """From `Memorizer.describe`: the memory model that is loaded, and what it can make."""

    model: str  # as configured
    fingerprint: str  # of its weights; `memory_worker.models.fingerprint.fingerprint_of` makes each kind's of it
    window: int  # tokens, of the model itself
    shape: MemoryShape
    kind: MemoryKind  # where a request names none
    kinds: dict[MemoryKind, KindDescription]

    def choose_kind(self, kind: MemoryKind | None, ratio: int | None, usual_ratio: int) -> tuple[MemoryKind, int]:
        """Kind and ratio of a memory for which these are asked, `usual_ratio` where it is none and the kind takes it.

        Raises `UnsupportedKind` or `UnfitRatio`.
        """
        kind = kind or self.kind
        if kind not in self.kinds:
            raise UnsupportedKind(kind, self.model, tuple(self.kinds))
        window, ratios = self.kinds[kind].window, self.kinds[kind].ratios
        if ratio is None:
            ratio = usual_ratio if len(ratios) > 1 else ratios[0]
        if ratio not in ratios:
            raise UnfitRatio(kind, ratio, window, ratios)
        return kind, ratio


@dataclass(frozen=True, slots=True)
class RecallRequest:
    """To `Recaller.recall`: clues of these kinds for one question, from one group of segments."""

    group: SegmentGroup
    question: str  # empty for key points
    kinds: tuple[ClueKind, ...]
    language: Language


@dataclass(frozen=True, slots=True)
class MemoryAnswerRequest:
    """To `Recaller.answer`: an answer from memory alone."""

    group: SegmentGroup
    question: str
    language: Language
    max_tokens: int | None  # None takes the configured default
    sampling: Sampling = LIKELIEST


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
