"""The Recaller deployment: clues, or an answer, from a memory. The Router calls it through a handle.

It is a vLLM engine whose prompts begin with a group of memory segments; `recall.connector` puts them there.
Importing this module imports vLLM (10 s); `recall.application` deploys it without that.
"""

import asyncio
import copy
import hashlib
import hmac
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

import ray
from ray import serve
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from cluster.engine_server import EngineServer
from cluster.errors import EngineFailed, cause_of
from cluster.messages import LIKELIEST, Finished, Sampling, TextDelta
from cluster.ray_internals import announce_rank
from cluster.routing import ReportsRank
from cluster.streams import merge_streams, retry_stream
from memory_worker.config import MemoryConfig
from memory_worker.errors import MemoryTooLarge, QuestionTooLong
from memory_worker.keeper.keeper import KeptMemory, local_keeper
from memory_worker.messages import Clue, ClueKind, MemoryAnswerRequest, RecallRequest, RecallUsage, SegmentGroup
from memory_worker.models.beacon.checkpoint import fingerprint, resolve
from memory_worker.models.prompts import mark_control_tokens, question_tokens
from memory_worker.recall.clues import ClueLines
from memory_worker.recall.groups import memories_of

logger = logging.getLogger("ray.serve")

_KEEPER_TIMEOUT_S = 10.0  # the memory is in the object store before the engine asks, so this is milliseconds
_CLUE_TOKENS_PER_PIECE = 8  # clues are read a line at a time; fewer pieces, and so fewer searches, cost less


class Recaller(ReportsRank, EngineServer):
    """Answers from memory. Every request waits until the keeper of this node has its group in the object store.

    Callers give the group's name as session id, which `cluster.routing` sends to the replica that holds it.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        llm_config: dict[str, Any],
        *,
        config: MemoryConfig,
        storage_root: str,
        namespace: str,
        secret: bytes,
        cores: str | None = None,
    ) -> None:
        """`secret` keeps the prefix cache's entries of different groups apart; it never leaves the servers."""
        self._config = config
        self._secret = secret
        self._namespace = namespace
        self._announced: int | None = None  # the rank
        budget = config.keeper.budget_bytes
        self._keeper = local_keeper(storage_root, budget, namespace)
        llm_config["engine_kwargs"]["kv_transfer_config"]["kv_connector_extra_config"] = {
            "ray_address": ray.get_runtime_context().gcs_address,
            "namespace": namespace,
            "storage_root": storage_root,
            "keeper_budget_bytes": budget,
            "keeper_timeout_s": _KEEPER_TIMEOUT_S,
            "fingerprint": await asyncio.to_thread(_fingerprint_of, config.engine.model),
        }
        await super().__init__(llm_config, cores=cores)
        tokenizer = self.tokenizer
        self._reader = mark_control_tokens(copy.deepcopy(tokenizer))  # the engine's own leaves special tokens out
        # Its text is never seen; vLLM skips special tokens fastest when it primes its detokenizer with the prompt.
        self._placeholder = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    async def record_routing_stats(self) -> dict[str, Any]:
        stats = await super().record_routing_stats()
        rank = serve.get_replica_context().rank.rank
        if rank != self._announced:  # keepers ask for a memory where its questions are sent
            here = ray.get_runtime_context().get_node_id()
            await asyncio.to_thread(announce_rank, self._namespace, rank, here)
            self._announced = rank
        return stats

    async def recall(self, request: RecallRequest) -> AsyncGenerator[Clue | RecallUsage, None]:
        """All kinds at once; each clue the moment its line is complete, `RecallUsage` last.

        Raises `MemoryNotFound`, `MixedMemories`, `DamagedFile`, `MemoryTooLarge`, `QuestionTooLong`, or
        `EngineFailed` when the engine gives up a second time. Closing the iterator stops the engine's work on it.
        """
        prompts: dict[ClueKind, _Prompt] = {}
        for kind in request.kinds:
            question = question_tokens(self._reader, kind, request.question, request.language)
            prompts[kind] = self._prompt(request, question, self._config.recall.max_clue_tokens)
        memory = await self._fetch_kept(request.group)
        completion_tokens = 0
        kinds = (self._clues(kind, prompt, memory) for kind, prompt in prompts.items())
        async with aclosing(merge_streams(kinds)) as items:
            async for item in items:
                if isinstance(item, Clue):
                    yield item
                else:
                    completion_tokens += item
        yield RecallUsage(sum(len(prompt.token_ids) for prompt in prompts.values()), completion_tokens)

    async def answer(self, request: MemoryAnswerRequest) -> AsyncGenerator[TextDelta | Finished, None]:
        """An answer from memory alone, as it is generated. Raises and closes as `recall` does."""
        max_tokens = request.max_tokens or self._config.recall.max_answer_tokens
        question = question_tokens(self._reader, "answer", request.question, request.language)
        prompt = self._prompt(request, question, max_tokens)
        memory = await self._fetch_kept(request.group)
        async with aclosing(self._generate(prompt, memory, sampling=request.sampling)) as pieces:
            async for piece in pieces:
                yield piece

    async def prefetch(self, group: SegmentGroup) -> bool:
        """Brings a group to this node before it is asked; false if that would cost others their place there.

        Raises what reading it from storage raises.
        """
        try:
            return bool(await self._keeper.prefetch.remote(group))
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None

    async def worker_stats(self) -> dict[str, float]:
        """From the engine's first worker: `memory_worker.recall.loading.LoadStats`."""
        stats: list[dict[str, float]] = await self._client.collective_rpc("recall_stats")
        return stats[0]

    async def _clues(self, kind: ClueKind, prompt: "_Prompt", memory: KeptMemory) -> AsyncGenerator[Clue | int, None]:
        """The clues of one kind; last the number of tokens generated for them."""
        lines, tokens = ClueLines(self._config.recall.max_clues), 0
        async with aclosing(self._generate(prompt, memory, _CLUE_TOKENS_PER_PIECE)) as pieces:
            async for piece in pieces:
                ended = isinstance(piece, Finished)
                for text in lines.close() if isinstance(piece, Finished) else lines.feed(piece.text):
                    yield Clue(kind, text)
                tokens = piece.completion_tokens if isinstance(piece, Finished) else tokens + piece.tokens
                if ended or lines.full:
                    break
        yield tokens

    async def _generate(
        self, prompt: "_Prompt", memory: KeptMemory, stream_interval: int = 1, sampling: Sampling = LIKELIEST
    ) -> AsyncGenerator[TextDelta | Finished, None]:
        """One generation. If the memory went away before the engine read it, it is fetched and tried once more."""

        def begin() -> AsyncGenerator[TextDelta | Finished, None]:
            return self.stream(
                prompt.token_ids,
                max_tokens=prompt.max_tokens,
                cache_salt=self._salt(memory.group),
                kv_transfer_params={"memory": memory.group.name, "num_memory_tokens": memory.total_slots},
                sampling=sampling,
                stream_interval=stream_interval,
            )

        async def fetch_again(state: RetryCallState) -> None:
            nonlocal memory
            assert state.outcome is not None, "it has failed"
            logger.warning("recalling from %s is tried again: %s", memories_of(memory.group), state.outcome.exception())
            memory = await self._fetch_kept(memory.group)

        once_more = AsyncRetrying(
            retry=retry_if_exception_type(EngineFailed),
            stop=stop_after_attempt(2),
            before_sleep=fetch_again,
            reraise=True,
        )
        async with aclosing(retry_stream(begin, once_more)) as pieces:
            async for piece in pieces:
                yield piece

    def _prompt(self, request: RecallRequest | MemoryAnswerRequest, question: list[int], max_tokens: int) -> "_Prompt":
        limit, slots = self._config.engine.max_model_len, request.group.slots
        room = limit - slots - max_tokens
        if room < 1:
            raise MemoryTooLarge(memories_of(request.group), slots, limit - max_tokens - 1)
        if len(question) > room:
            raise QuestionTooLong(len(question), room, slots, limit)
        return _Prompt([self._placeholder] * slots + question, max_tokens)

    async def _fetch_kept(self, group: SegmentGroup) -> KeptMemory:
        """The group, in this node's object store for as long as the result is held."""
        try:
            memory: KeptMemory = await self._keeper.chunks.remote(group)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        return memory

    def _salt(self, group: SegmentGroup) -> str:
        return hmac.new(self._secret, group.name.encode(), hashlib.sha256).hexdigest()


def _fingerprint_of(model: str) -> str:
    """Of a folder, or of what a name on a hub stands for: what is there or, without a network, in the cache here."""
    return fingerprint(resolve(model))


class _Prompt(NamedTuple):
    token_ids: list[int]  # a placeholder for each memory slot, then the question
    max_tokens: int
