"""How far a memorize job has come, durably: a job that was killed continues after its last flush.

Used by the Memorizer alone. Segments are encoded one after another, so of those that are written every one is complete
but the last. Restarted where a flush ended, the same groups of windows follow as without the interruption, and the
same files: byte for byte, on the same kind of device.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.planning.costs import MemoryKind
from cluster.storage.durable import DamagedFile, StoredFile
from memory_worker.errors import DamagedMemory
from memory_worker.manifest import MemoryKey, MemoryShape, SegmentEntry
from memory_worker.storage.segments import Segment
from memory_worker.storage.store import MemoryStore, checkpoint_path, head_path, segment_path

if TYPE_CHECKING:
    from memory_worker.models.beacon import Part, Slots

FORMAT = 2
logger = logging.getLogger("ray.serve")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True, slots=True)
class PlannedSegment:
    """A stretch of a document's tokens."""

    document: int  # index among the job's
    index: int  # among the document's segments
    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


class PlannedDocument(_Part):
    id: str
    tokens: int
    digest: str  # SHA-256 of its token ids: it changes with the source and with the tokenizer


class JobPlan(_Part):
    """All that decides the files of a job: one with another plan cannot go on from its checkpoint."""

    format: int = FORMAT
    kind: MemoryKind = "beacon"
    fingerprint: str
    shape: MemoryShape
    window: int
    ratio: int
    language: str
    head_tokens: tuple[int, ...]
    group_windows: int  # of all ranks together
    ranks: int = 1
    checkpoint_windows: int
    segment_tokens: int
    together: int = 1  # KV heads that share their slots
    documents: tuple[PlannedDocument, ...]

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.documents)

    def may_have(self, tokens: int, slots: int) -> bool:
        """Whether so many tokens of a document can have become so many slots; for a gist, that is as it was written."""
        if self.kind == "gist":
            return 0 < slots <= -(-tokens // self.window) * (self.window // self.ratio)
        return slots == -(-tokens // self.ratio)

    def segments(self) -> list[PlannedSegment]:
        """In the order in which they are encoded."""
        step = self.segment_tokens
        return [
            PlannedSegment(number, index, start, min(start + step, document.tokens))
            for number, document in enumerate(self.documents)
            for index, start in enumerate(range(0, document.tokens, step))
        ]


class Checkpoint(_Part):
    """`checkpoint.json`: all that it names is written."""

    plan: JobPlan
    head: StoredFile
    segments: tuple[SegmentEntry, ...]  # in the plan's order; the last may lack its later windows


@dataclass(frozen=True, slots=True)
class Begun:
    """What a job starts from: its head, and what an earlier attempt has written."""

    head: StoredFile
    head_slots: "Slots"
    segments: tuple[SegmentEntry, ...] = ()
    unfinished: "Slots | None" = None  # slots of the last of `segments`, if windows are missing from it


def find_begun(store: MemoryStore, key: MemoryKey, plan: JobPlan, head: StoredFile | None) -> Begun | None:
    """What an earlier attempt at `plan` has written, every file verified; `head` is the one it must have been given.

    None if there is nothing to go on from; where there is a checkpoint, the reason is logged.
    """
    path = checkpoint_path(key)
    try:
        checkpoint = Checkpoint.model_validate_json(store.storage.read_unverified(path).to_pybytes())
        changed = [name for name in JobPlan.model_fields if getattr(checkpoint.plan, name) != getattr(plan, name)]
        if checkpoint.head != head if head else checkpoint.head.path != head_path(key):
            changed.append("head")
        if not changed:
            return _verify(store, checkpoint, path)
        reason = f"it is of other work: {', '.join(changed)}"
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = f"it is not one: {error.errors()[0]['msg']}"
    except DamagedFile as error:
        reason = str(error)
    logger.warning("memorizing begins anew, the checkpoint %s cannot be used: %s", path, reason)
    return None


def read_slots(segments: Sequence[Segment]) -> "Slots":
    """The slots of these files, one after another."""
    from memory_worker.models.beacon import Slots

    return Slots.concat([Slots(*segment.tensors()) for segment in segments])


class CheckpointedSegments:
    """Takes a job's slots in order, and writes them with a checkpoint whenever enough windows are pending."""

    def __init__(self, store: MemoryStore, key: MemoryKey, plan: JobPlan, start: Begun) -> None:
        self._store = store
        self._key = key
        self._plan = plan
        self._head = start.head
        self._planned = plan.segments()
        self._written = list(start.segments)
        self._pending: list[Part] = []
        self._first = len(self._written) - (start.unfinished is not None)
        self.remaining = self._planned[self._first :]  # to be encoded; of an unfinished segment, the rest
        if start.unfinished is not None:
            unfinished = self.remaining[0]
            done = self._written[-1].tokens
            self.remaining[0] = replace(unfinished, start=unfinished.start + done)
        self.done_tokens = sum(segment.tokens for segment in self._written)  # grows with what is pending

    def add(self, part: "Part") -> None:
        """The next tokens of `remaining[part.document]`: whole windows, or up to its end."""
        self._pending.append(replace(part, slots=part.slots.to("cpu")))
        self.done_tokens += part.tokens

    def flush(self, *, everything: bool = False) -> None:
        """Between two groups of windows: writes what is pending if that is enough, or `everything`."""
        windows = sum(-(-part.tokens // self._plan.window) for part in self._pending)
        if not windows or (windows < self._plan.checkpoint_windows and not everything):
            return
        for number, parts in groupby(self._pending, key=lambda part: part.document):
            self._write(self._first + number, [*parts])
        self._pending.clear()
        checkpoint = Checkpoint(plan=self._plan, head=self._head, segments=tuple(self._written))
        self._store.storage.write(checkpoint_path(self._key), checkpoint.model_dump_json(indent=1).encode())

    def by_document(self) -> list[tuple[SegmentEntry, ...]]:
        """What is written of each of the plan's documents."""
        written = zip(self._planned, self._written, strict=False)
        return [tuple(entry for _, entry in own) for _, own in groupby(written, key=lambda pair: pair[0].document)]

    def _write(self, number: int, parts: "list[Part]") -> None:
        planned = self._planned[number]
        before = self._written.pop() if number < len(self._written) else None
        first_window = before.tokens // self._plan.window if before else 0
        path = segment_path(self._key, self._plan.documents[planned.document].id, planned.index, first_window)
        counts = parts[0].counts  # a pool is a whole file
        if counts is not None and len(parts) > 1:
            raise ValueError("windows with a pool each cannot lie in one file: checkpoint_windows must be 1")
        file = self._store.write_segment(
            path, self._plan.shape, [(part.slots.keys, part.slots.values) for part in parts], counts
        )
        tokens, slots = sum(part.tokens for part in parts), sum(len(part.slots) for part in parts)
        dropped = sum(part.tokens * part.dropped for part in parts) / tokens
        shared = counts is not None
        entry = SegmentEntry(tokens=tokens, slots=slots, files=(file,), dropped=dropped, head_budgets=shared)
        if before:
            entry = SegmentEntry(
                tokens=before.tokens + tokens,
                slots=before.slots + slots,
                files=(*before.files, file),
                dropped=(before.tokens * before.dropped + tokens * dropped) / (before.tokens + tokens),
                head_budgets=before.head_budgets or shared,
            )
        self._written.append(entry)


def _verify(store: MemoryStore, checkpoint: Checkpoint, path: str) -> Begun:
    """Raises `DamagedFile` unless all that the checkpoint names is there and is what its plan asks for."""
    plan, segments = checkpoint.plan, checkpoint.segments
    planned = plan.segments()[: len(segments)]
    done = [segment.tokens for segment in segments]
    whole = [segment.tokens for segment in planned]
    if done[:-1] != whole[:-1] or (done and not 0 < done[-1] <= whole[-1]):
        raise DamagedMemory(path, "counts other segments than its plan")
    unfinished = bool(done) and done[-1] < whole[-1]
    if unfinished and done[-1] % plan.window:
        raise DamagedMemory(path, "ends within a window")
    head = store.read_segment(checkpoint.head)
    head.expect(plan.shape, len(plan.head_tokens))
    files: list[Segment] = []
    for segment in segments:
        files = [store.read_segment(file) for file in segment.files]
        slots = sum(file.slots for file in files)
        fits = slots == segment.slots and plan.may_have(segment.tokens, slots)
        if not fits or {f.shape for f in files} != {plan.shape}:
            raise DamagedMemory(path, f"does not say what {', '.join(f.path for f in files)} hold")
    return Begun(checkpoint.head, read_slots([head]), segments, read_slots(files) if unfinished else None)
