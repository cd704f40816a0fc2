"""The `Embedder` deployment: texts to vectors, with batches shared by all requests of a replica."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from retrieval_worker.config import EmbedderConfig
from retrieval_worker.embedders import load_embedder
from retrieval_worker.messages import EmbedderDescription, Embeddings

_CHECK_S = 5.0  # a health check waits so long for its computation; Serve gives up on a check after 30 s
_STILL_S = 120.0  # a model that has computed nothing for so long, and for ten times its slowest batch, is stuck


class Embedder:
    """Embeds texts. One replica computes one batch at a time, in a thread.

    Each batch takes one text from every waiting call in turn until it is full: a single question joins the
    next batch however long the book is that is being indexed, and neither starves the other.
    """

    def __init__(self, config: EmbedderConfig) -> None:
        self._config = config
        self._model = load_embedder(config)
        self._model.encode(["warm up"])
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._waiting: deque[_Call] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._waited_s = 0.0  # texts of the last batch, on average
        self._computed = time.monotonic()  # when one last succeeded
        self._checked = 0.0  # what `_computed` was when a health check last looked
        self._slowest_s = 0.0  # computation
        self._check: asyncio.Future[Embeddings] | None = None  # the computation of a health check that is under way

    async def embed(self, texts: Sequence[str], query: bool = False) -> Embeddings:
        """Vectors of `texts`, in order; `query` says that they search rather than are searched.

        Raises `UnicodeEncodeError` for a text with half a surrogate pair, before it can spoil a shared batch.
        """
        prompt = self._model.query_prompt if query else self._model.passage_prompt
        if not texts:
            return self._model.encode([])
        for text in texts:
            text.encode()
        call = _Call([prompt + text for text in texts])
        self._waiting.append(call)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._run())
        try:
            return await call.result
        finally:
            if call in self._waiting:  # cancelled or failed: what is left of it is not computed
                self._waiting.remove(call)

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by the embedder's tokenizer, special tokens left out."""
        return await asyncio.to_thread(self._model.count_tokens, texts)

    async def describe(self) -> EmbedderDescription:
        name = self._config.kind if self._config.kind == "minilm" else self._config.model
        return EmbedderDescription(
            model=name,
            dimension=self._model.dimension,
            has_sparse=self._model.has_sparse,
            max_tokens=self._model.max_tokens,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """`queue_s`: seconds that the texts of the last batch waited for it; 0 while nothing is to be done."""
        idle = self._worker is None or self._worker.done()
        return {"queue_s": 0.0 if idle else self._waited_s}

    async def check_health(self) -> None:
        """Has the model embed a word, unless it did something since the last check. Raises what that raises.

        Behind a long batch it waits its turn, over several checks if need be: `TimeoutError` is raised when nothing at
        all has come out for long, by the measure of what came out before.
        """
        if self._check is None:
            if self._computed > self._checked:
                self._checked = self._computed
                return
            self._check = self._encode(["healthy"])
        await asyncio.wait([self._check], timeout=_CHECK_S)
        if self._check.done():
            check, self._check = self._check, None
            check.result()
        elif (still_s := time.monotonic() - self._computed) > max(_STILL_S, 10 * self._slowest_s):
            raise TimeoutError(f"the embedder has computed nothing for {still_s:.0f} s; its replica must be replaced")

    def _encode(self, texts: list[str]) -> asyncio.Future[Embeddings]:
        """What the model makes of them, in the compute thread."""

        def encode() -> Embeddings:
            began = time.monotonic()
            made = self._model.encode(texts)
            self._computed = time.monotonic()
            self._slowest_s = max(self._slowest_s, self._computed - began)
            return made

        return asyncio.get_running_loop().run_in_executor(self._compute, encode)

    async def _run(self) -> None:
        """Computes batches until no call waits."""
        await asyncio.sleep(self._config.batch_wait_ms / 1000)
        while self._waiting:
            batch = self._next_batch()
            texts = [call.texts[row] for call, row in batch]
            now = time.monotonic()
            self._waited_s = sum(now - call.came for call, _ in batch) / max(len(batch), 1)
            computing = self._encode(texts)
            await asyncio.wait([computing])
            error = computing.exception()
            if error is None:
                for position, (call, row) in enumerate(batch):
                    call.put(row, computing.result(), position)
            else:
                for call in {call for call, _ in batch}:
                    call.fail(error)
            await asyncio.sleep(0)  # answered callers run, and may bring texts to the next batch

    def _next_batch(self) -> list[tuple["_Call", int]]:
        batch: list[tuple[_Call, int]] = []
        while self._waiting and len(batch) < self._config.batch_size:
            call = self._waiting.popleft()
            if call.result.done():
                continue
            batch.append((call, call.next_row))
            call.next_row += 1
            if call.next_row < len(call.texts):
                self._waiting.append(call)
        return batch


class _Call:
    """The texts of one `embed` and the rows of them that are done."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.next_row = 0
        self.came = time.monotonic()
        self.result: asyncio.Future[Embeddings] = asyncio.get_running_loop().create_future()
        self._dense: np.ndarray | None = None  # [texts, dim]
        self._sparse: list[dict[int, float]] | None = None
        self._missing = len(texts)

    def put(self, row: int, batch: Embeddings, position: int) -> None:
        """Takes row `position` of a batch as the vectors of text `row`."""
        if self._dense is None:
            self._dense = np.empty((len(self.texts), batch.dense.shape[1]), np.float32)
            self._sparse = None if batch.sparse is None else [{} for _ in self.texts]
        self._dense[row] = batch.dense[position]
        if self._sparse is not None and batch.sparse is not None:
            self._sparse[row] = batch.sparse[position]
        self._missing -= 1
        if not self._missing and not self.result.done():
            self.result.set_result(Embeddings(self._dense, self._sparse))

    def fail(self, error: BaseException) -> None:
        if not self.result.done():
            self.result.set_exception(error)
