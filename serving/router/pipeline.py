"""The pipeline of one question over the worker pools (MemoRAG, arXiv 2409.05591, §2): called by the Router.

Clues are recalled while the question is already being searched; each clue is searched the moment its line is
complete; the rankings are fused; the generator answers from the passages; the sentences that support question
and answer are picked as evidence. If recall fails, the question goes on as plain RAG and says so.

Each stage is an OpenTelemetry span below those that Serve makes of its own calls, which carry a trace from the proxy
to the engines (`ray.tracing` in the profile); where nothing is traced, spans do nothing.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from opentelemetry import trace
from ray.serve.handle import DeploymentHandle
from tenacity import AsyncRetrying, before_sleep_log, retry_if_exception, wait_fixed

from cluster.messages import LIKELIEST, Finished, Sampling, TextDelta
from cluster.storage.durable import Storage
from cluster.streams import merge_streams, retry_stream
from generator_worker.messages import GenerateRequest, GenerateTask, Generation, Source, SourcesRead
from memory_worker.manifest import Manifest
from memory_worker.messages import Clue, ClueKind, MemoryAnswerRequest, RecallRequest, RecallUsage, SegmentGroup
from memory_worker.recall.clues import ClueLines
from retrieval_worker.config import SearchConfig
from retrieval_worker.fusion import clue_weights, select_hits
from retrieval_worker.messages import EvidenceRequest, Hit, Index, Ranking
from serving import api
from serving.errors import is_callers_fault, is_unavailable, problem_for
from serving.router.conversation import recent_turns, stands_alone
from serving.router.versions import AskedVersions
from serving.router.views import citation_out, clue_out, passage_out

logger = logging.getLogger(f"ray.serve.{__name__}")  # with its replica and request id
_tracer = trace.get_tracer("memorag")

# What is recalled from memory for each task.
CLUE_KINDS: dict[api.Task, tuple[ClueKind, ...]] = {
    "memorag": ("span", "question", "draft"),
    "summarize": ("key_point",),
}
READ_MEMORY = {*CLUE_KINDS, "memory"}  # tasks that ask the memory model
_MOST_REWRITES = 8  # questions taken from the generator's list

_MOST_LONGER, _MOST_ADDED = 3, 200  # of a question made whole, in characters: a longer one is something else

_PREPARED = 2048  # passages at most, fewer than a Retriever keeps
_RETRY_S = 0.2  # a replica whose engine died answers until it is replaced: not asked again at once

PipelineEvent = Clue | Hit | TextDelta | api.Answer


class Prepared:
    """Passages whose sentences were lately sent to be embedded: the Retriever still has them, with luck."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], None] = {}  # index, passage

    def take_missing(self, index: Index, passages: tuple[int, ...]) -> tuple[int, ...]:
        """Those of `passages` not asked for before; they count as prepared from now on."""
        missing = tuple(passage for passage in passages if (index.name, passage) not in self._known)
        if len(self._known) > _PREPARED:
            self._known.clear()
        self._known.update(dict.fromkeys((index.name, passage) for passage in passages))
        return missing


@dataclass(frozen=True, slots=True)
class Pools:
    """Handles of the deployments a question passes through, and what bounds it there."""

    recaller: DeploymentHandle
    retriever: DeploymentHandle
    generator: DeploymentHandle
    search: SearchConfig
    recall_deadline_s: float
    question_deadline_s: float
    history_characters: int
    degraded: tuple[str, ...]  # what is true of every answer of this deployment, such as embedded-model
    prepared: Prepared
    storage: Storage
    on_damage: Callable[[Sequence[Manifest], BaseException], Awaitable[bool]]  # told of errors that are survived


class Inquiry:
    """One question in flight over one version of each of some memories of a tenant."""

    def __init__(
        self,
        pools: Pools,
        asked: AskedVersions,
        groups: Sequence[SegmentGroup],
        question: api.Question,
        cache_salt: str,
        lease_s: float,
    ) -> None:
        """`groups` are the memories' segments as the Recaller reads them; `cache_salt` is the tenant's.

        The question is over when the lease on the versions is.
        """
        self._pools = pools
        self.manifests = manifests = asked.manifests
        self._groups = groups
        self._question = question
        self._cache_salt = cache_salt
        self._language: api.Language = question.language or ("zh" if manifests[0].language == "zh" else "en")
        self._index = asked.index
        names = "+".join(f"{manifest.tenant}/{manifest.memory}" for manifest in manifests)
        self._retriever = pools.retriever.options(session_id=names)
        self._queries: asyncio.Queue[str | None] = asyncio.Queue()  # None: no more will come
        self._tasks: list[asyncio.Task[Any]] = []
        self._started = time.perf_counter()
        self._deadline = time.monotonic() + min(pools.question_deadline_s, lease_s)
        self.clues: list[Clue] = []
        self.hits: list[Hit] = []  # in the order that citations number them
        self.usage = api.Usage()
        self.timings = api.Timings()
        self.degraded = list(pools.degraded)

    async def run(self) -> AsyncIterator[PipelineEvent]:
        """Clues, passages, pieces of the answer as they come; the whole answer last.

        Closing the iterator cancels the work in every pool. Raises `TimeoutError` past the question's deadline.
        """
        event: PipelineEvent
        try:
            await self._make_whole()
            if self._question.task == "memory":
                async for event in self._answer_from_memory():
                    yield event
                return
            if self._question.task == "full":
                async for event in self._generate():
                    yield event
                return
            searching = self.begin_search()
            drafting = self._question.task in ("hyde", "rewrite")
            kinds = CLUE_KINDS.get(self._question.task, ())
            async for clue in self._draft() if drafting else self.recall(kinds):
                self._queries.put_nowait(clue.text)
                yield clue
            await self.retrieve(searching)
            async for event in self._generate():
                yield event
        finally:
            for task in self._tasks:
                task.cancel()

    async def _make_whole(self) -> None:
        """Writes the question so that it can be understood, and searched, without the conversation before it."""
        question = self._question
        if not question.messages or stands_alone(question.question, self._language):
            return
        turns = recent_turns(question.messages, self._pools.history_characters, self._language)
        if not turns:
            return
        generation = await self._write("whole", tuple(Source(turn, age) for age, turn in enumerate(turns)))
        whole = " ".join(generation.text.split())
        if whole and len(whole) <= _MOST_LONGER * len(question.question) + _MOST_ADDED:
            self._question = question.model_copy(update={"question": whole})

    async def recall(self, kinds: tuple[ClueKind, ...], *, required: bool = False) -> AsyncIterator[Clue]:
        """The clues, each the moment its line is complete; none where recall fails, unless they are `required`.

        Memories that one prompt cannot hold are asked group by group, all at once; a clue counts once.
        """
        if not kinds:
            return
        known: set[tuple[ClueKind, str]] = set()
        groups = (self._recall_group(group, kinds, required) for group in self._groups)
        try:
            async with aclosing(merge_streams(groups)) as clues:
                async for clue in clues:
                    if (clue.kind, clue.text.casefold()) not in known:
                        known.add((clue.kind, clue.text.casefold()))
                        self.clues.append(clue)
                        yield clue
        finally:
            self._end_stage("recall", self._started, clues=len(self.clues), groups=len(self._groups))
        self.timings.recall = self._elapsed_ms()

    async def _recall_group(
        self, group: SegmentGroup, kinds: tuple[ClueKind, ...], required: bool
    ) -> AsyncGenerator[Clue, None]:
        request = RecallRequest(group, self._question.question, kinds, self._language)
        deadline = min(self._deadline, time.monotonic() + self._pools.recall_deadline_s)
        recaller = self._pools.recaller.options(stream=True, session_id=group.name)
        try:
            async with aclosing(_stream(lambda: recaller.recall.remote(request), deadline)) as items:
                async for item in items:
                    if isinstance(item, RecallUsage):
                        self.usage.recall_prompt_tokens += item.prompt_tokens
                        self.usage.recall_completion_tokens += item.completion_tokens
                    else:
                        yield item
        except Exception as error:
            # A boundary: whatever broke there, the question can be answered without clues, unless it is at fault.
            if required or is_callers_fault(error):
                raise
            names = ", ".join(manifest.memory for manifest in self.manifests)
            logger.warning("recall failed for %s, going on without: %r", names, error)
            await self._pools.on_damage(self.manifests, error)
            if "recall" not in self.degraded:
                self.degraded.append("recall")

    async def _draft(self) -> AsyncIterator[Clue]:
        """What the generator, which has not seen the text, would search with: for comparison with clues."""
        hyde = self._question.task == "hyde"
        generation = await self._write("hyde" if hyde else "rewrite")
        lines = ClueLines(_MOST_REWRITES)
        texts = [generation.text] if hyde else [*lines.feed(generation.text), *lines.close()]
        for text in filter(str.strip, texts):
            self.clues.append(Clue("draft" if hyde else "question", text.strip()))
            yield self.clues[-1]
        self.timings.recall = self._elapsed_ms()

    async def _write(self, task: GenerateTask, sources: tuple[Source, ...] = ()) -> Generation:
        """What the generator writes for the search, in one piece; counted with what recall costs."""
        items = [item async for item in self._stream_generation(task, sources, stream=False)]
        generation = items[-1]
        assert isinstance(generation, Generation), "the generator's stream ends with one"
        self.usage.recall_prompt_tokens += generation.prompt_tokens
        self.usage.recall_completion_tokens += generation.completion_tokens
        return generation

    def begin_search(self) -> asyncio.Task[list[Ranking]]:
        """Searches the question now, and each clue as it comes, until `retrieve` asks for the rankings."""
        # A summary asks nothing: the title stands for it until key points come.
        titles = " ".join(manifest.title for manifest in self.manifests if manifest.title)
        self._queries.put_nowait(self._question.question or titles or "summary")
        self._tasks.append(task := asyncio.create_task(self._search()))
        return task

    async def retrieve(self, searching: asyncio.Task[list[Ranking]]) -> None:
        """Waits for the searches still running, fuses all rankings, keeps what the budget allows."""
        began = self._elapsed_ms()
        self._queries.put_nowait(None)
        rankings = await searching
        self.hits = select_hits(rankings, self._weights(rankings), self._pools.search)
        self.timings.retrieve = self._elapsed_ms() - began
        self._end_stage("retrieve", self._started + began / 1000, queries=len(rankings), passages=len(self.hits))

    def _weights(self, rankings: list[Ranking]) -> list[float]:
        """Clues count by their grounding, measured by the question's; in a summary by that of the best of them."""
        if self._question.task in ("hyde", "rewrite"):  # guesses of a model that has not seen the text
            return [1.0] * len(rankings)
        measure = rankings[:1] if self._question.question else rankings
        return clue_weights(rankings, max(ranking.grounding for ranking in measure))

    async def _search(self) -> list[Ranking]:
        """All rankings, the question's first. What came during one search goes into the next, together."""
        rankings: list[Ranking] = []
        more = True
        while more:
            queries = [await self._queries.get()]
            while not self._queries.empty():
                queries.append(self._queries.get_nowait())
            more = None not in queries
            if texts := [query for query in queries if query is not None]:
                rankings += await self._ask_index(partial(self._call, self._retriever.search), texts)
        return rankings

    async def _generate(self) -> AsyncIterator[Hit | TextDelta | api.Answer]:
        began = self._elapsed_ms()
        ids = tuple(hit.passage.id for hit in self.hits)
        if missing := self._pools.prepared.take_missing(self._index, ids):
            self._tasks.append(asyncio.create_task(self._prepare_evidence(missing)))
        tasks: dict[api.Task, GenerateTask] = {"summarize": "summarize", "full": "full"}
        task = tasks.get(self._question.task, "answer")
        if task == "full":
            sources = await asyncio.to_thread(self._read_texts)
        else:
            sources = tuple(Source(hit.passage.text, hit.score) for hit in self.hits)
        generation: Generation | None = None
        async for item in self._stream_generation(task, sources, stream=self._question.stream):
            if isinstance(item, SourcesRead):
                self.hits = [self.hits[index] for index in item.sources]
                for hit in self.hits:
                    yield hit
            elif isinstance(item, Generation):
                generation = item
            else:
                yield item
        assert generation is not None, "the generator's stream ends with a Generation"
        self.timings.generate = self._elapsed_ms() - began
        self._end_stage("generate", self._started + began / 1000, tokens=generation.completion_tokens)
        self.usage.prompt_tokens = generation.prompt_tokens
        self.usage.completion_tokens = generation.completion_tokens
        if generation.cut:
            self.degraded.append("text-cut")
        yield await self._answer(generation)

    async def _stream_generation(
        self, task: GenerateTask, sources: tuple[Source, ...], *, stream: bool
    ) -> AsyncIterator[SourcesRead | TextDelta | Generation]:
        """What the Generator makes of the question and the sources."""
        question, answers = self._question, task not in ("hyde", "rewrite", "whole")
        request = GenerateRequest(
            task=task,
            question=question.question,
            sources=sources,
            language=self._language,
            max_tokens=question.max_tokens if answers else None,
            cache_salt=self._cache_salt,
            short=question.short and task in ("answer", "full"),
            system=question.system if answers else None,
            sampling=_sampling_of(question) if answers else LIKELIEST,
            stream=stream,
        )
        generator = self._pools.generator.options(stream=True)
        try:
            async for item in _stream(lambda: generator.generate.remote(request), self._deadline):
                yield item
        except Exception as error:
            # A boundary: the passages were found and are worth having even without an answer.
            raise problem_for(error).with_members(
                passages=[passage_out(hit).model_dump() for hit in self.hits],
                clues=[clue_out(clue).model_dump() for clue in self.clues],
            ) from error

    async def _prepare_evidence(self, passages: tuple[int, ...]) -> None:
        await self._ask_index(partial(self._call, self._retriever.prepare_evidence), passages)

    async def _answer(self, generation: Generation) -> api.Answer:
        evidence = []
        if self.hits:
            ids = tuple(hit.passage.id for hit in self.hits)
            question, began = self._question.question, time.perf_counter()

            async def find(index: Index, ids: tuple[int, ...]) -> Any:
                request = EvidenceRequest(index, ids, question, generation.text)
                return await self._call(self._retriever.evidence, request)

            evidence = await self._ask_index(find, ids)
            self._end_stage("evidence", began, sentences=len(evidence))
        return self._finish(
            answer=generation.text,
            reason=generation.finish_reason,
            citations=[citation_out(n, self.hits[n - 1]) for n in generation.citations],
            evidence=[api.EvidenceOut(**asdict(sentence)) for sentence in evidence],
        )

    async def _answer_from_memory(self) -> AsyncIterator[TextDelta | api.Answer]:
        (group,) = self._groups  # `QuestionLimits` lets no more pass
        question = self._question
        request = MemoryAnswerRequest(
            group, question.question, self._language, question.max_tokens, _sampling_of(question)
        )
        reason = "stop"
        pieces: list[str] = []
        recaller = self._pools.recaller.options(stream=True, session_id=request.group.name)
        async for item in _stream(lambda: recaller.answer.remote(request), self._deadline):
            if isinstance(item, Finished):
                self.usage.recall_prompt_tokens += item.prompt_tokens
                self.usage.recall_completion_tokens += item.completion_tokens
                reason = item.reason
            else:
                pieces.append(item.text)
                yield item
        self.timings.recall = self._elapsed_ms()
        self._end_stage("recall", self._started, tokens=self.usage.recall_completion_tokens)
        yield self._finish(answer="".join(pieces).strip(), reason=reason, citations=[], evidence=[])

    def _finish(
        self, *, answer: str, reason: str, citations: list[api.CitationOut], evidence: list[api.EvidenceOut]
    ) -> api.Answer:
        asked = [api.MemoryVersion(id=manifest.memory, version=manifest.version) for manifest in self.manifests]
        return api.Answer(
            memory=asked[0].id if len(asked) == 1 else None,
            version=asked[0].version if len(asked) == 1 else None,
            memories=asked,
            task=self._question.task,
            question=self._question.question,
            answer=answer,
            finish_reason=reason,
            citations=citations,
            evidence=evidence,
            clues=[clue_out(clue) for clue in self.clues],
            passages=[passage_out(hit) for hit in self.hits],
            degraded=self.degraded,
            usage=self.usage,
            timings_ms=self.end_timings(),
        )

    async def _ask_index(self, ask: Callable[[Index, Any], Awaitable[Any]], what: Any) -> Any:
        """What the Retriever says of the index, which is named alone; given whole where it is not open there."""
        found = await ask(self._index.by_name, what)
        return await ask(self._index, what) if found is None else found

    async def _call(self, method: Any, *arguments: Any) -> Any:
        """What a deployment's method returns; a replica that dies is waited for, and its successor asked."""

        async def call() -> Any:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                return await method.remote(*arguments)

        return await _until_available(self._deadline)(call)

    def _read_texts(self) -> tuple[Source, ...]:
        """Every document of every memory, whole, in order. Raises `DamagedFile`."""
        files = [document.source for manifest in self.manifests for document in manifest.documents]
        return tuple(Source(bytes(self._pools.storage.read(file)).decode()) for file in files)

    def end_timings(self) -> api.Timings:
        """The timings, of a question that has been answered now."""
        self.timings.total = self._elapsed_ms()
        return self.timings

    def _end_stage(self, stage: str, began: float, **counts: int) -> None:
        """A stage that began then (`time.perf_counter`) has ended now; `counts` say how much there was of what."""
        now, past = time.time_ns(), time.perf_counter() - began
        attributes: dict[str, Any] = {
            "memorag.memory": [manifest.memory for manifest in self.manifests],
            "memorag.version": [manifest.version for manifest in self.manifests],
            "memorag.tenant": self.manifests[0].tenant,
            "memorag.task": self._question.task,
        }
        attributes |= {f"memorag.{name}": count for name, count in counts.items()}
        _tracer.start_span(f"memorag.{stage}", start_time=now - int(past * 1e9), attributes=attributes).end(now)

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._started) * 1000


def _sampling_of(question: api.Question) -> Sampling:
    return Sampling(question.temperature, question.top_p, question.seed, tuple(question.stop))


def _stream(call: Callable[[], Any], deadline: float) -> AsyncGenerator[Any, None]:
    """The items of the stream that `call` starts; started again if its replica dies before the first item.

    Raises `TimeoutError` when it has not ended by `deadline` (monotonic seconds). Closing it cancels the stream.
    """

    async def begin() -> AsyncGenerator[Any, None]:
        stream = call()
        try:
            iterator = aiter(stream)
            while True:
                try:
                    item = await asyncio.wait_for(anext(iterator), deadline - time.monotonic())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            stream.cancel()

    return retry_stream(begin, _until_available(deadline))


def _until_available(deadline: float) -> AsyncRetrying:
    """Calls again what failed for want of a replica, until `deadline` (monotonic seconds)."""
    return AsyncRetrying(
        retry=retry_if_exception(is_unavailable),
        stop=lambda _: time.monotonic() >= deadline,
        wait=wait_fixed(_RETRY_S),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
