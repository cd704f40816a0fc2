"""The Memorizer deployment: texts into segments. The Router asks it; what it writes, the manifest names."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
from ray import serve

from cluster.planning.costs import MemoryKind
from cluster.pools.pools import PoolConfig
from memory_worker.config import MemoryConfig
from memory_worker.errors import EmptyDocument, UnsupportedKind, WindowTooLarge
from memory_worker.manifest import Document, MemoryShape
from memory_worker.memorize.checkpoint import (
    Begun,
    CheckpointedSegments,
    JobPlan,
    PlannedDocument,
    find_begun,
    read_slots,
)
from memory_worker.memorize.kinds.encoder import Encoder, encoders
from memory_worker.memorize.ranks import Ranks, load_model, rank_share, replica_options
from memory_worker.messages import (
    KindDescription,
    Language,
    MemorizeProgress,
    MemorizerDescription,
    MemorizeRequest,
    MemorizeResult,
)
from memory_worker.models.embedded import load_tokenizer
from memory_worker.models.fingerprint import fingerprint_of
from memory_worker.models.prompts import head_tokens, mark_control_tokens
from memory_worker.storage.store import MemoryStore, head_path

if TYPE_CHECKING:
    from memory_worker.models.stock import MemoryModel

_USUAL_KINDS: tuple[MemoryKind, ...] = ("beacon", "pruned", "gist")  # the first that the model can make
_Step = MemorizeProgress | MemorizeResult
_PIECE_CHARACTERS = 100_000  # bounds what a tokenizer holds beside the tokens themselves


def memorizer_application(
    config: MemoryConfig, pool: PoolConfig, storage_root: str, name: str = "Memorizer"
) -> serve.Application:
    """The Serve application of `Memorizer` on `pool`."""
    options = pool.deployment_options(amounts={"queued_tokens": pool.scaling.queued_tokens})
    share = None
    if config.memorize.ranks > 1:
        share = rank_share(config, pool)
        options |= replica_options(config, pool)
    deployment: Any = serve.deployment(Memorizer, name=name, **options)
    return deployment.bind(config, storage_root, share)


class Memorizer:
    """One memory model. Jobs share it group by group: a short text does not wait for a long one to end.

    With `memorize.ranks`, other ranks share each group; `share` is what each takes of Ray's resources.
    """

    def __init__(self, config: MemoryConfig, storage_root: str, share: Mapping[str, float] | None = None) -> None:
        self._config = config
        self._store = MemoryStore(storage_root)
        # The other ranks load the model while this one does.
        self._ranks = Ranks(config, share or {}) if config.memorize.ranks > 1 else None
        self._model = load_model(config)
        if self._ranks:
            self._ranks.join(self._model)
        wanted = config.memorize.segment_tokens
        if wanted is not None and wanted < self._model.window:
            raise ValueError(
                f"memorize.segment_tokens is {wanted}, less than one window of the memory model, which has "
                f"{self._model.window} tokens: raise it, or leave it out"
            )
        self._tokenizer = mark_control_tokens(load_tokenizer(config.engine.model))
        # Now, and never while another thread reads a text: that switches the whole tokenizer's special tokens off.
        self._heads = {language: head_tokens(self._tokenizer, language) for language in get_args(Language)}
        room, together = config.group_slots, config.heads_together(self._model.kv_heads)
        self._encoders = encoders(self._model, self._ranks, self._tokenizer, room=room, together=together)
        self._description = _describe(config, self._model, self._encoders)
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="memorize")  # one pass at a time
        self._device_error: Exception | None = None
        self._left: dict[int, int] = {}  # tokens of each call under way that are not encoded yet

    async def memorize(self, request: MemorizeRequest) -> AsyncGenerator[_Step, None]:
        """Writes the head's and the documents' segments; yields progress after each group, then the result.

        A version whose work was cut short goes on after its last checkpoint, to the same files. Ending the iteration
        early stops the work after the group under way; what no checkpoint holds yet is done again the next time.
        Raises `UnsupportedKind`, `UnfitRatio`, `WindowTooLarge`, `EmptyDocument`, `DamagedFile` naming a source or the
        given head where it is not as it was written, or `LostRank`, after which the same call goes on.
        """
        # Checked when it was asked for, but the job may go on under another memory model than it was accepted for.
        self._description.choose_kind(request.kind, request.ratio, request.ratio)
        job = await asyncio.to_thread(self._prepare, request)
        self._left[id(job)] = job.plan.tokens
        steps = self._steps(job)
        try:
            while (step := await self._next(steps)) is not None:
                if isinstance(step, MemorizeProgress):
                    self._left[id(job)] = step.total_tokens - step.done_tokens
                yield step
        finally:
            del self._left[id(job)]
            self._torch.submit(steps.close)  # after the group under way, which cannot be interrupted

    async def describe(self) -> MemorizerDescription:
        """What this replica has loaded."""
        return self._description

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """`queued_tokens`: of all calls under way, those that are not encoded yet."""
        return {"queued_tokens": float(sum(self._left.values()))}

    async def check_health(self) -> None:
        """Raises once the device has failed, which only a new process mends."""
        if self._device_error:
            raise self._device_error

    async def _next(self, steps: Iterator[_Step]) -> _Step | None:
        import torch

        try:
            return await asyncio.get_running_loop().run_in_executor(self._torch, next, steps, None)
        except torch.AcceleratorError as error:
            self._device_error = error
            raise

    def _prepare(self, request: MemorizeRequest) -> "_Job":
        """All that storage and tokenizer have for the request."""
        memorize, head = self._config.memorize, self._heads[request.language]
        encoder = self._encoders[request.kind]
        texts = tuple(self._read_text(document) for document in request.documents)
        plan = JobPlan(
            kind=request.kind,
            fingerprint=fingerprint_of(request.kind, self._description.fingerprint),
            shape=self._description.shape,
            window=encoder.window,
            ratio=request.ratio,
            language=request.language,
            head_tokens=tuple(head),
            group_windows=(memorize.group_windows or self._model.group_windows) * encoder.ranks,
            ranks=encoder.ranks,
            checkpoint_windows=encoder.checkpoint_windows or memorize.checkpoint_windows,
            segment_tokens=self._segment_tokens(encoder.window, request.ratio, len(head)),
            together=encoder.together,
            documents=tuple(
                PlannedDocument(id=document.id, tokens=len(tokens), digest=hashlib.sha256(tokens.tobytes()).hexdigest())
                for document, tokens in zip(request.documents, texts, strict=True)
            ),
        )
        start = find_begun(self._store, request.key, plan, request.head)
        if start is None and request.head:
            given = self._store.read_segment(request.head)
            given.expect(plan.shape, len(head))
            start = Begun(request.head, read_slots([given]))
        return _Job(request, plan, texts, start)

    def _segment_tokens(self, window: int, ratio: int, head_slots: int) -> int:
        """Most tokens of a segment: whole windows, as many as configured or as fit a prompt."""
        room = self._config.group_slots
        fitting = (room - head_slots) // (window // ratio)
        if fitting < 1:
            raise WindowTooLarge(window, ratio, head_slots + window // ratio, room)
        wanted = self._config.memorize.segment_tokens
        return window * (fitting if wanted is None else max(1, min(fitting, wanted // window)))

    def _read_text(self, document: Document) -> npt.NDArray[np.int32]:
        """The document's tokens."""
        text = self._store.storage.read(document.source).to_pybytes().decode()
        tokens = np.concatenate([np.array(self._encode(piece), np.int32) for piece in _pieces(text)])
        if not len(tokens):
            raise EmptyDocument(document.id)
        return tokens

    def _encode(self, text: str) -> list[int]:
        """What looks like a control token in a text is read as plain characters."""
        tokens: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return tokens

    def _steps(self, job: "_Job") -> Generator[_Step, None, None]:
        """The work itself, one group of windows at a time; to be run and closed in the torch thread."""
        import torch

        from memory_worker.models.beacon import Slots

        plan = job.plan
        start = job.start or self._with_new_head(job)
        segments = CheckpointedSegments(self._store, job.request.key, plan, start)
        yield MemorizeProgress(segments.done_tokens, plan.tokens)
        memories = [start.head_slots] * len(segments.remaining)
        if start.unfinished is not None:
            memories[0] = Slots.concat([start.head_slots, start.unfinished])
        for group in self._encoders[plan.kind].encode(
            [torch.from_numpy(job.texts[s.document][s.start : s.end]) for s in segments.remaining],
            ratio=plan.ratio,
            language=job.request.language,
            memory=memories,
            group_windows=plan.group_windows,
        ):
            for part in group:
                segments.add(part)
            segments.flush()
            yield MemorizeProgress(segments.done_tokens, plan.tokens)
        segments.flush(everything=True)
        yield MemorizeResult(
            model=self._description.model,
            fingerprint=plan.fingerprint,
            shape=plan.shape,
            head_tokens=plan.head_tokens,
            head=start.head,
            segments=tuple(segments.by_document()),
        )

    def _with_new_head(self, job: "_Job") -> Begun:
        from memory_worker.models.beacon import Slots

        plan = job.plan
        read = self._model.compress_documents([plan.head_tokens], ratio=None)
        slots = Slots.concat([part.slots for (part,) in read])
        head = self._store.write_segment(head_path(job.request.key), plan.shape, [(slots.keys, slots.values)])
        return Begun(head, slots)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A request with what was read for it."""

    request: MemorizeRequest
    plan: JobPlan
    texts: tuple[npt.NDArray[np.int32], ...]  # tokens of each of its documents
    start: Begun | None  # none where the head is still to be encoded


def _describe(config: MemoryConfig, model: "MemoryModel", made: Mapping[MemoryKind, Encoder]) -> MemorizerDescription:
    """Raises `UnsupportedKind` where the configured kind cannot be made."""
    shape = MemoryShape(
        layers=model.layers, kv_heads=model.kv_heads, head_dim=model.head_dim, dtype=config.memorize.dtype
    )
    usual = next(kind for kind in _USUAL_KINDS if kind in made)
    kind = config.memorize.kind or usual
    if kind not in made:
        raise UnsupportedKind(kind, config.engine.model, tuple(made))
    kinds = {name: KindDescription(encoder.window, encoder.ratios) for name, encoder in made.items()}
    return MemorizerDescription(config.engine.model, model.fingerprint, model.window, shape, kind, kinds)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that a tokenizer takes at a time, cut after a line, else after a space, else anywhere."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        cut = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]
