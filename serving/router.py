"""The Router: the life of memories and questions over the worker pools. The ingress and Ray clients call it."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.messages import TextDelta
from cluster.storage import Storage
from memory_worker.catalog import catalog
from memory_worker.errors import MemoryNotReady, WrongModel
from memory_worker.manifest import JobDocument, JobRecord, Manifest
from memory_worker.messages import Clue, MemorizerDescription, MemoryRecord
from memory_worker.store import check_id
from retrieval_worker.messages import Hit
from serving import api
from serving.config import Profile
from serving.convert import detect_language
from serving.errors import ProblemError, problem_for
from serving.jobs import Jobs
from serving.manifests import memory_out
from serving.pipeline import CLUE_KINDS, Inquiry, Pools, Prepared, clue_out, passage_out

_EVENT_WAIT_S = 10.0  # how long one poll of the catalog waits for a change


class Router:
    """One replica. All methods take the tenant first; failures are `ProblemError`s."""

    def __init__(
        self,
        profile: Profile,
        storage_root: str,
        degraded: tuple[str, ...],
        memorizer: DeploymentHandle,
        recaller: DeploymentHandle,
        retriever: DeploymentHandle,
        generator: DeploymentHandle,
    ) -> None:
        self._profile = profile
        self._storage = Storage(storage_root)
        self._catalog = catalog(storage_root, profile.ray.namespace)
        self._memorizer = memorizer
        self._jobs = Jobs(self._storage, self._catalog, memorizer, retriever)
        self._pools = Pools(
            recaller,
            retriever,
            generator,
            profile.retrieval.search,
            profile.memory.recall.deadline_s,
            degraded,
            Prepared(),
        )
        self._model: MemorizerDescription | None = None
        self._tokenizer: Any = None
        self._resuming = asyncio.get_running_loop().create_task(self._jobs.resume())

    # -- memories ------------------------------------------------------------------------------------------

    async def create(self, tenant: str, request: api.CreateMemory) -> api.MemoryOut:
        """Starts to make a memory of the documents; it is `memorizing` when this returns."""
        model = await self._memory_model()
        if len(request.documents) > self._profile.limits.documents:
            raise ProblemError(
                413,
                f"{len(request.documents)} documents; one memory takes {self._profile.limits.documents} at most",
            )
        ratio = request.ratio or self._profile.memory.memorize.ratio
        if request.ratio is not None and request.ratio not in model.ratios:
            valid = ", ".join(map(str, model.ratios))
            raise ProblemError(
                422,
                f"ratio {request.ratio} does not divide the window of {model.window} tokens; use one of {valid}",
            )
        documents = _named_documents(request.documents)
        memory = request.id if request.id is not None else _id_from(request.title)
        job = JobRecord(
            documents=tuple(JobDocument(id=name, characters=len(text)) for name, text in documents),
            ratio=ratio,
            language=await asyncio.to_thread(detect_language, documents[0][1]),
            title=request.title,
        )
        try:
            check_id(memory, "memory")
            await self._jobs.create(tenant, memory, job, [text for _, text in documents])
            return memory_out(await self._catalog.get.remote(tenant, memory))
        except Exception as error:
            raise problem_for(error) from error

    async def get(self, tenant: str, memory: str) -> api.MemoryOut:
        return memory_out(await self._record(tenant, memory))

    async def list_memories(self, tenant: str, cursor: str | None, limit: int) -> api.MemoryList:
        records, following = await self._catalog.list.remote(tenant, cursor, limit)
        return api.MemoryList(memories=[memory_out(record) for record in records], next_cursor=following)

    async def delete(self, tenant: str, memory: str) -> None:
        """Deletes the memory and all its versions; ends its job, if it is still being made."""
        await self._record(tenant, memory)
        await self._jobs.cancel(tenant, memory)
        await self._catalog.delete.remote(tenant, memory)

    async def source(self, tenant: str, memory: str, document: str) -> str:
        """The text of one document, that all offsets count in."""
        manifest = await self._ready(tenant, memory)
        for entry in manifest.documents:
            if entry.id == document:
                try:
                    buffer = await asyncio.to_thread(self._storage.read, entry.source.stored)
                except Exception as error:
                    raise problem_for(error) from error
                return bytes(buffer).decode()
        names = ", ".join(entry.id for entry in manifest.documents[:20])
        raise ProblemError(404, f"memory {memory!r} has no document {document!r}; it has {names}")

    async def events(self, tenant: str, memory: str) -> AsyncIterator[api.Event]:
        """Progress of a memory in the making, until it is ready or failed."""
        record = await self._record(tenant, memory)
        began, first = time.monotonic(), record.done_tokens
        while record.status == "memorizing":
            rate = (record.done_tokens - first) / max(time.monotonic() - began, 1e-3)
            left = (record.total_tokens - record.done_tokens) / rate if rate > 0 and record.total_tokens else None
            progress = api.ProgressOut(
                status=record.status,
                done_tokens=record.done_tokens,
                total_tokens=record.total_tokens,
                tokens_per_second=rate,
                seconds_left=left,
            )
            yield api.Event(name="progress", data=progress.model_dump())
            try:
                record = await self._catalog.wait.remote(tenant, memory, record.revision, _EVENT_WAIT_S)
            except Exception as error:
                raise problem_for(error) from error
        yield api.Event(
            name="ready" if record.status == "ready" else "failed",
            data=memory_out(record).model_dump(mode="json"),
        )

    # -- questions -----------------------------------------------------------------------------------------

    async def ask(self, tenant: str, memory: str, question: api.Question) -> AsyncIterator[api.Event]:
        """Events clue, passage, token; last done, or error."""
        try:
            inquiry = await self._inquiry(tenant, memory, question)
            async for item in inquiry.run():
                yield _event(item)
        except Exception as error:  # noqa: BLE001  the response has begun: the failure travels as its last event
            yield api.Event(name="error", data=problem_for(error).body())

    async def answer(self, tenant: str, memory: str, question: api.Question) -> api.Answer:
        """The whole answer at once."""
        inquiry = await self._inquiry(tenant, memory, question)
        try:
            async for item in inquiry.run():
                if isinstance(item, api.Answer):
                    return item
        except Exception as error:
            raise problem_for(error) from error
        raise ProblemError(500, "the pipeline ended without an answer")

    async def clues(self, tenant: str, memory: str, query: api.CluesQuery) -> api.CluesOut:
        """Recall on its own."""
        question = api.Question(question=query.question, language=query.language)
        inquiry = await self._inquiry(tenant, memory, question)
        started = time.perf_counter()
        try:
            clues = [clue_out(clue) async for clue in inquiry.recall(CLUE_KINDS["memorag"], required=True)]
        except Exception as error:
            raise problem_for(error) from error
        inquiry.timings.total = (time.perf_counter() - started) * 1000
        return api.CluesOut(
            memory=memory,
            version=inquiry.version,
            clues=clues,
            degraded=inquiry.degraded,
            usage=inquiry.usage,
            timings_ms=inquiry.timings,
        )

    async def passages(self, tenant: str, memory: str, query: api.PassagesQuery) -> api.PassagesOut:
        """Retrieval on its own, with the text as it is."""
        inquiry = await self._inquiry(tenant, memory, api.Question(question=query.question, task="rag"))
        started = time.perf_counter()
        try:
            await inquiry.retrieve(inquiry.begin_search())
        except Exception as error:
            raise problem_for(error) from error
        inquiry.timings.total = (time.perf_counter() - started) * 1000
        hits = [passage_out(hit) for hit in inquiry.hits]
        return api.PassagesOut(memory=memory, version=inquiry.version, passages=hits, timings_ms=inquiry.timings)

    # -- health --------------------------------------------------------------------------------------------

    async def ready(self) -> api.Readiness:
        """Returns when every pool has answered."""
        try:
            _, _, recaller, generator = await asyncio.gather(
                self._memory_model(),
                self._pools.retriever.describe.remote(),
                self._pools.recaller.stats.remote(),
                self._pools.generator.stats.remote(),
            )
        except Exception as error:
            raise problem_for(error) from error
        running = {"Recaller": recaller.requests, "Generator": generator.requests}
        return api.Readiness(status="ok", running=running)

    async def _memory_model(self) -> MemorizerDescription:
        if self._model is None:
            self._model = await self._memorizer.describe.remote()
        return self._model

    async def _record(self, tenant: str, memory: str) -> MemoryRecord:
        try:
            check_id(memory, "memory")
            return await self._catalog.get.remote(tenant, memory)
        except Exception as error:
            raise problem_for(error) from error

    async def _ready(self, tenant: str, memory: str) -> Manifest:
        record = await self._record(tenant, memory)
        if record.manifest is None:
            raise problem_for(MemoryNotReady(memory, record.status, record.error))
        return record.manifest

    async def _inquiry(self, tenant: str, memory: str, question: api.Question) -> Inquiry:
        manifest = await self._ready(tenant, memory)
        await self._check_question(question)
        running = (await self._memory_model()).fingerprint
        if question.task != "rag" and manifest.fingerprint != running:
            raise problem_for(WrongModel(memory, manifest.fingerprint, running))
        return Inquiry(self._pools, manifest, question)

    async def _check_question(self, question: api.Question) -> None:
        limits, text = self._profile.limits, question.question
        if question.task != "summarize" and not text.strip():
            raise ProblemError(422, "the question is empty; ask something")
        if question.max_tokens is not None and question.max_tokens > limits.answer_tokens:
            raise ProblemError(
                422, f"max_tokens is {question.max_tokens}; at most {limits.answer_tokens} can be asked for"
            )
        window = (await self._memory_model()).window
        if len(text) <= window // 4:  # a token is at least one byte of UTF-8, a character at most four
            return
        if len(text) > limits.question_characters:
            raise ProblemError(
                422,
                f"the question has {len(text)} characters, more than limits.question_characters and the memory model's "
                f"window of {window} tokens; memorize long texts instead",
            )
        if (tokens := await asyncio.to_thread(self._tokens, text)) > window:
            raise ProblemError(
                422,
                f"the question has {tokens} tokens, more than the memory model's window of {window}; "
                "memorize long texts instead",
            )

    def _tokens(self, text: str) -> int:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            model = Path(self._profile.memory.engine.model)
            local = model / "tokenizer.json"
            self._tokenizer = (
                Tokenizer.from_file(str(local)) if local.exists() else Tokenizer.from_pretrained(str(model))
            )
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def router_deployment(profile: Profile) -> serve.Deployment:
    """The Router on the CPU pool of `profile`."""
    return serve.deployment(Router, name="Router", **profile.pools.cpu.deployment_options())


def _event(item: Clue | Hit | TextDelta | api.Answer) -> api.Event:
    if isinstance(item, Clue):
        return api.Event(name="clue", data=clue_out(item).model_dump())
    if isinstance(item, Hit):
        return api.Event(name="passage", data=passage_out(item).model_dump())
    if isinstance(item, TextDelta):
        return api.Event(name="token", data={"text": item.text})
    return api.Event(name="done", data=item.model_dump())


def _named_documents(documents: list[api.DocumentIn]) -> list[tuple[str, str]]:
    named: dict[str, str] = {}
    for number, document in enumerate(documents, start=1):
        name = document.id if document.id is not None else f"doc-{number}"
        try:
            check_id(name, "document")
            document.text.encode()
        except UnicodeEncodeError:
            raise ProblemError(422, f"document {name!r} has half a surrogate pair; send valid Unicode") from None
        except Exception as error:
            raise problem_for(error) from error
        if not document.text.strip():
            raise ProblemError(422, f"document {name!r} holds no text but white space; send a text that has some")
        if name in named:
            raise ProblemError(422, f"two documents are called {name!r}; give each its own id")
        named[name] = document.text
    return list(named.items())


def _id_from(title: str | None) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", (title or "").lower()).strip("-")[:60]
    return f"{slug or 'memory'}-{uuid.uuid4().hex[:8]}"
