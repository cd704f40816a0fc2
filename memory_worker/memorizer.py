"""The Memorizer deployment: texts into segments. The Router asks it; what it writes, the manifest names."""

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve

from cluster.pools import PoolConfig
from cluster.storage import DamagedFile
from memory_worker.config import MemoryConfig
from memory_worker.errors import EmptyDocument
from memory_worker.manifest import DocumentEntry, FileEntry, MemoryShape
from memory_worker.messages import (
    DocumentSource,
    MemorizeProgress,
    MemorizerDescription,
    MemorizeRequest,
    MemorizeResult,
)
from memory_worker.prompts import head_tokens
from memory_worker.store import MemoryStore, StoredSegment, head_path, segment_path

if TYPE_CHECKING:
    from memory_worker.beacon import BeaconModel

_Step = MemorizeProgress | MemorizeResult
_PIECE_CHARACTERS = 100_000  # bounds what a tokenizer holds beside the tokens themselves


def memorizer_application(
    config: MemoryConfig, pool: PoolConfig, storage_root: str, name: str = "Memorizer"
) -> serve.Application:
    """The Serve application of `Memorizer` on `pool`."""
    deployment: Any = serve.deployment(Memorizer, name=name, **pool.deployment_options())
    return deployment.bind(config, storage_root)


class Memorizer:
    """One memory model. Jobs share it group by group: a short text does not wait for a long one to end."""

    def __init__(self, config: MemoryConfig, storage_root: str) -> None:
        import torch
        from transformers import AutoTokenizer

        from memory_worker.beacon import BeaconModel

        self._config = config
        self._store = MemoryStore(storage_root)
        if config.memorize.threads:
            torch.set_num_threads(config.memorize.threads)
        device = config.memorize.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = BeaconModel.from_pretrained(
            config.engine.model,
            dtype=getattr(torch, config.memorize.dtype),
            device=device,
        )
        self._description = _described(config, self._model)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(config.engine.model)
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="memorize")  # one pass at a time
        self._device_error: Exception | None = None

    async def memorize(self, request: MemorizeRequest) -> AsyncIterator[_Step]:
        """Writes the head's and the documents' segments; yields progress after each group, then the result.

        Ending the iteration early stops the work after the group under way and leaves no unfinished file. Raises
        `UnsupportedRatio`, `EmptyDocument`, or `DamagedFile` if a source is not there.
        """
        self._model.check_ratio(request.ratio)
        head, texts = await asyncio.to_thread(self._read, request)
        steps = self._steps(request, head, texts)
        try:
            while (step := await self._next(steps)) is not None:
                yield step
        finally:
            self._torch.submit(steps.close)  # after the group under way, which cannot be interrupted

    async def describe(self) -> MemorizerDescription:
        """What this replica has loaded."""
        return self._description

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

    def _read(self, request: MemorizeRequest) -> tuple[list[int], list["_Text"]]:
        """The tokens of the head, and each document's text."""
        return head_tokens(self._tokenizer, request.language), [self._read_text(d) for d in request.documents]

    def _read_text(self, document: DocumentSource) -> "_Text":
        try:
            source = self._store.storage.record(document.path)
        except FileNotFoundError:
            raise DamagedFile(document.path, "is missing") from None
        text = self._store.storage.read(source).to_pybytes().decode()
        tokens = [token for piece in _pieces(text) for token in self._encode(piece)]
        if not tokens:
            raise EmptyDocument(document.id)
        return _Text(document.id, FileEntry.of(source), len(text), tokens)

    def _encode(self, text: str) -> list[int]:
        """What looks like a special token in a text is read as plain characters."""
        tokens: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return tokens

    def _steps(self, request: MemorizeRequest, head: list[int], texts: list["_Text"]) -> Generator[_Step, None, None]:
        """The work itself, one group of windows at a time; to be run and closed in the torch thread."""
        key, shape = request.key, self._description.shape
        total = sum(len(text.tokens) for text in texts)
        yield MemorizeProgress(0, total)
        head_slots = self._model.compress(head, ratio=request.ratio, head=len(head))
        with self._store.write_segment(head_path(key), shape) as head_segment:
            head_segment.append(head_slots.keys, head_slots.values)
        done = 0
        open_segments: dict[int, tuple[StoredSegment, ExitStack]] = {}
        entries: dict[int, DocumentEntry] = {}
        with ExitStack() as unfinished:  # closed with the exception that ends the work: no half segment appears
            for group in self._model.compress_documents(
                [text.tokens for text in texts],
                ratio=request.ratio,
                memory=head_slots,
                group_windows=self._config.memorize.group_windows,
            ):
                for part in group:
                    text = texts[part.document]
                    if part.document not in open_segments:
                        file = unfinished.enter_context(ExitStack())
                        path = segment_path(key, text.id)
                        open_segments[part.document] = file.enter_context(self._store.write_segment(path, shape)), file
                    segment, file = open_segments[part.document]
                    window_slots = self._model.window // request.ratio
                    segment.append(part.slots.keys, part.slots.values, window_slots=window_slots)
                    done += part.tokens
                    if part.last:
                        file.close()
                        del open_segments[part.document]
                        entries[part.document] = text.entry(segment)
                yield MemorizeProgress(done, total)
        yield MemorizeResult(
            model=self._description.model,
            fingerprint=self._description.fingerprint,
            shape=shape,
            head_tokens=tuple(head),
            head=head_segment.entry,
            documents=tuple(entries[index] for index in range(len(texts))),
        )


@dataclass(frozen=True, slots=True)
class _Text:
    """A document on its way into a segment."""

    id: str
    source: FileEntry
    characters: int
    tokens: list[int]

    def entry(self, segment: StoredSegment) -> DocumentEntry:
        return DocumentEntry(
            id=self.id,
            characters=self.characters,
            tokens=len(self.tokens),
            slots=segment.slots,
            source=self.source,
            segment=segment.entry,
        )


def _described(config: MemoryConfig, model: "BeaconModel") -> MemorizerDescription:
    shape = MemoryShape(
        layers=model.layers, kv_heads=model.kv_heads, head_dim=model.head_dim, dtype=config.memorize.dtype
    )
    return MemorizerDescription(config.engine.model, model.fingerprint, model.window, model.ratios_that_divide(), shape)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that a tokenizer takes at a time, cut after a line, else after a space, else anywhere."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        cut = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]
