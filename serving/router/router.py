"""The Router: the life of memories and questions over the worker pools. The ingress and Ray clients call it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.planning.costs import MemoryKind
from cluster.storage.durable import Storage, StoredFile
from memory_worker.catalog.actor import catalog
from memory_worker.errors import NoJob
from memory_worker.manifest import JobRecord, Manifest, MemoryKey
from memory_worker.messages import MemorizerDescription, MemoryRecord, ReadLease, Reservation, SegmentGroup
from memory_worker.recall.groups import segment_groups
from memory_worker.storage.store import check_id, new_request
from serving import api
from serving.config import Profile
from serving.documents.uploads import memory_id
from serving.errors import ProblemError, damaged_path, problem_for
from serving.router.jobs import Jobs
from serving.router.once import KeyedAnswers
from serving.router.pipeline import CLUE_KINDS, READ_MEMORY, Inquiry, Pools, Prepared
from serving.router.question_limits import QuestionLimits
from serving.router.secret import salt_of
from serving.router.usage_metrics import UsageMetrics
from serving.router.versions import AskedVersions, Versions, require_same_model
from serving.router.views import clue_out, event_out, memory_out, passage_out, progress_out

logger = logging.getLogger(f"ray.serve.{__name__}")  # with its replica and request id

_EVENT_WAIT_S = 10.0  # how long one poll of the catalog waits for a change


class Router(KeyedAnswers):
    """One replica. All methods take the tenant first. What they raise is for `serving.errors.problem_for`."""

    def __init__(
        self,
        profile: Profile,
        storage_root: str,
        secret: bytes,
        degraded: tuple[str, ...],
        memorizer: DeploymentHandle,
        recaller: DeploymentHandle,
        retriever: DeploymentHandle,
        generator: DeploymentHandle,
    ) -> None:
        self._profile = profile
        self._secret = secret
        self._catalog = catalog(storage_root, profile.ray.namespace, profile.memory.catalog, profile.quotas)
        self._versions = Versions(
            storage_root, self._catalog, profile.memory.group_slots, profile.router.cached_manifests_mib << 20
        )
        self._memorizer = memorizer
        self._pools = Pools(
            recaller,
            retriever,
            generator,
            profile.retrieval.search,
            profile.memory.recall.deadline_s,
            profile.limits.question_s,
            profile.limits.history_characters,
            degraded,
            Prepared(),
            Storage(storage_root),
            self._repair,
        )
        self._limits = QuestionLimits(profile)
        self._metrics = UsageMetrics()
        self._model: MemorizerDescription | None = None
        settings = (profile.memory.catalog, profile.quotas)
        jobs = Jobs(self._catalog, self._versions.manifest, settings, memorizer, retriever, self._prefetch)
        self._working = asyncio.get_running_loop().create_task(jobs.run_forever())

    # -- memories ------------------------------------------------------------------------------------------

    async def reserve(
        self,
        tenant: str,
        memory: str | None,
        title: str | None,
        tags: Sequence[str],
        kind: MemoryKind | None,
        ratio: int | None,
        documents: int,
    ) -> tuple[MemoryKey, JobRecord]:
        """Where the texts of a new memory are put, and the job that `begin` is given with their documents and language.

        A name is made if none is given. Raises what is wrong with any of it, before a text is sent.
        """
        self._check_documents(documents)
        chosen, fitting = (await self._memory_model()).choose_kind(kind, ratio, self._profile.memory.memorize.ratio)
        name = memory if memory is not None else memory_id(title)
        reserved: Reservation = await self._catalog.reserve.remote(tenant, name, create=True)
        job = JobRecord(
            documents=(),
            memory_kind=chosen,
            ratio=fitting,
            language="",
            title=title,
            tags=tuple(dict.fromkeys(tags)),
        )
        return reserved.key, job

    async def reserve_change(
        self, tenant: str, memory: str, document: str, if_match: str | None
    ) -> tuple[MemoryKey, JobRecord]:
        """Where the text of a document is put that is added or replaced, and the job, which lacks the document."""
        check_id(document, "document")
        reserved: Reservation = await self._catalog.reserve.remote(tenant, memory, create=False, if_match=if_match)
        assert reserved.base is not None, "a change has a base"
        try:
            base = await self._versions.manifest(reserved.base)
            if document not in {entry.id for entry in base.documents}:
                self._check_documents(len(base.documents) + 1)
            require_same_model(base, await self._memory_model())
        except Exception:
            await self.abandon(reserved.key)
            raise
        job = JobRecord(
            kind="put",
            base=base.version,
            documents=(),
            memory_kind=base.kind,
            ratio=base.ratio,
            language=base.language,
            title=base.title,
            tags=base.tags,
        )
        return reserved.key, job

    async def reserve_import(self, tenant: str, memory: str, manifest: Manifest) -> Reservation:
        """Where the files of an archive are put before `adopt`. Raises where another model encoded it."""
        require_same_model(manifest, await self._memory_model(), memory)
        self._check_documents(len(manifest.documents))
        return await self._catalog.reserve.remote(tenant, memory, create=True)

    async def adopt(self, manifest: Manifest) -> api.MemoryOut:
        """A memory of files that are in storage already."""
        return await self._show(await self._catalog.adopt.remote(manifest))

    async def begin(self, key: MemoryKey, job: JobRecord) -> api.MemoryOut:
        """Begins to make a version of texts that are in storage: when this returns the memory is `memorizing`, or being
        changed while its present version is asked."""
        return await self._show(await self._catalog.begin.remote(key, job))

    async def abandon(self, key: MemoryKey) -> None:
        """Gives up what was reserved, with the texts put there."""
        await self._catalog.abandon.remote(key)

    async def remove_document(self, tenant: str, memory: str, document: str, if_match: str | None) -> api.MemoryOut:
        """Removes a document; the version without it is there when this returns."""
        removed = self._catalog.remove_document.remote(tenant, memory, document, if_match, new_request())
        return await self._show(await removed)

    async def cancel(self, tenant: str, memory: str) -> None:
        """Ends the job of the memory."""
        job = (await self._record(tenant, memory)).job
        if job is None:
            raise NoJob(memory)
        await self._catalog.cancel.remote(job.key)

    async def get(self, tenant: str, memory: str) -> api.MemoryOut:
        return await self._show(await self._record(tenant, memory))

    async def list_memories(self, tenant: str, cursor: str | None, limit: int, tag: str | None) -> api.MemoryList:
        records, following = await self._catalog.list.remote(tenant, cursor, limit, tag)

        async def show(record: MemoryRecord) -> api.MemoryOut | None:
            try:
                return await self._show(record)
            except Exception as error:
                if problem_for(error).status != 404:
                    raise
                return None  # it has been deleted since

        shown = await asyncio.gather(*map(show, records))
        return api.MemoryList(memories=[memory for memory in shown if memory], next_cursor=following)

    async def delete(self, tenant: str, memory: str) -> None:
        """Deletes the memory and all its versions; ends its job, if it is being made or changed."""
        await self._catalog.delete.remote(tenant, memory, new_request())

    async def manifest(self, tenant: str, memory: str) -> Manifest:
        """The present version, whose files stay for the retention's grace."""
        return await self._read(tenant, memory)

    async def hold(self, key: MemoryKey) -> None:
        """Keeps a version that is read for long from being deleted."""
        await self._catalog.hold.remote(key)

    async def source(self, tenant: str, memory: str, document: str) -> StoredFile:
        """The file with the text of one document, that all offsets count in; it stays for the retention's grace."""
        manifest = await self._read(tenant, memory)
        for entry in manifest.documents:
            if entry.id == document:
                return entry.source
        names = ", ".join(entry.id for entry in manifest.documents[:20])
        raise ProblemError(404, f"memory {memory!r} has no document {document!r}; it has {names}")

    async def usage(self, tenant: str) -> api.UsageOut:
        """What the tenant has and may have."""
        used = await self._catalog.usage.remote(tenant)
        return api.UsageOut(
            tenant=tenant,
            memories=used.memories,
            tokens=used.tokens,
            bytes=used.bytes,
            jobs=used.jobs,
            quota=self._profile.quotas.of(tenant).model_dump(),
        )

    async def events(self, tenant: str, memory: str) -> AsyncIterator[api.Event]:
        """Progress of a memory's job, until it has made the memory ready, or failed. Raises where that is deleted.

        Who comes after the job has ended is told how the last one did: a short one may end before anybody follows it.
        """
        record = await self._record(tenant, memory)
        began, first = time.monotonic(), record.job.done_tokens if record.job else 0
        followed = record.job.key if record.job else None
        while record.job and record.job.key == followed:
            rate = (record.job.done_tokens - first) / max(time.monotonic() - began, 1e-3)
            progress = progress_out(record.status, record.job, rate)
            yield api.Event(name="progress", data=progress.model_dump())
            record = await self._catalog.wait.remote(tenant, memory, record.revision, _EVENT_WAIT_S)
        lost = record.failed_change is not None and followed in (None, record.failed_change.key)
        shown = await self._show(record)
        yield api.Event(name="failed" if lost or record.error else "ready", data=shown.model_dump(mode="json"))

    # -- questions -----------------------------------------------------------------------------------------

    async def ask(
        self, tenant: str, memories: Sequence[str], tag: str | None, question: api.Question
    ) -> AsyncIterator[api.Event]:
        """Events clue, passage, token; last done."""
        async with self._inquire(tenant, memories, tag, question) as inquiry:
            async for item in inquiry.run():
                if isinstance(item, api.Answer):
                    self._metrics.count_question(tenant, item)
                yield event_out(item)

    async def answer(self, tenant: str, memories: Sequence[str], tag: str | None, question: api.Question) -> api.Answer:
        """The whole answer at once."""
        async with self._inquire(tenant, memories, tag, question) as inquiry:
            async for item in inquiry.run():
                if isinstance(item, api.Answer):
                    self._metrics.count_question(tenant, item)
                    return item
        raise ProblemError(500, "the pipeline ended without an answer")

    async def clues(self, tenant: str, memory: str, query: api.CluesQuery) -> api.CluesOut:
        """Recall on its own."""
        question = api.Question(question=query.question, language=query.language)
        async with self._inquire(tenant, [memory], None, question) as inquiry:
            clues = [clue_out(clue) async for clue in inquiry.recall(CLUE_KINDS["memorag"], required=True)]
        return api.CluesOut(
            memory=memory,
            version=inquiry.manifests[0].version,
            clues=clues,
            degraded=inquiry.degraded,
            usage=inquiry.usage,
            timings_ms=inquiry.end_timings(),
        )

    async def passages(self, tenant: str, memory: str, query: api.PassagesQuery) -> api.PassagesOut:
        """Retrieval on its own, with the text as it is."""
        question = api.Question(question=query.question, task="rag")
        async with self._inquire(tenant, [memory], None, question) as inquiry:
            await inquiry.retrieve(inquiry.begin_search())
        return api.PassagesOut(
            memory=memory,
            version=inquiry.manifests[0].version,
            passages=[passage_out(hit) for hit in inquiry.hits],
            timings_ms=inquiry.end_timings(),
        )

    # -- health --------------------------------------------------------------------------------------------

    async def ready(self) -> api.Readiness:
        """Returns when every pool has answered, but for those that may sleep: asking would wake them."""
        pools, handles = self._profile.pools, self._pools
        engines = {"Recaller": (pools.memory, handles.recaller), "Generator": (pools.generator, handles.generator)}
        awake = {name: handle for name, (pool, handle) in engines.items() if pool.min_replicas}
        try:
            stats = await asyncio.gather(*(handle.stats.remote() for handle in awake.values()))
            if pools.memory.min_replicas:
                await self._memory_model()
            if pools.retrieval.min_replicas:
                await handles.retriever.describe.remote()
        except Exception as error:
            raise problem_for(error) from error
        running = {name: each.requests for name, each in zip(awake, stats, strict=True)}
        return api.Readiness(status="ok", running=running)

    def check_health(self) -> None:
        """Raises if no jobs are taken any more."""
        if self._working.done():
            self._working.result()

    # -- inside --------------------------------------------------------------------------------------------

    def _check_documents(self, count: int) -> None:
        """Raises for more documents than one memory may have."""
        if count > self._profile.limits.documents:
            raise ProblemError(413, f"{count} documents; one memory takes {self._profile.limits.documents} at most")

    async def _memory_model(self) -> MemorizerDescription:
        if self._model is None:
            self._model = await self._memorizer.describe.remote()
        return self._model

    async def _record(self, tenant: str, memory: str) -> MemoryRecord:
        return await self._catalog.get.remote(tenant, memory)

    async def _read(self, tenant: str, memory: str) -> Manifest:
        lease: ReadLease = await self._catalog.read.remote(tenant, memory)
        return await self._versions.manifest(lease.key)

    async def _show(self, record: MemoryRecord) -> api.MemoryOut:
        if record.status != "ready":
            return memory_out(record, None)
        return memory_out(record, await self._versions.manifest(record.key))

    @asynccontextmanager
    async def _inquire(
        self, tenant: str, memories: Sequence[str], tag: str | None, question: api.Question
    ) -> AsyncIterator[Inquiry]:
        """A question about the present versions of the memories. What the block raises becomes a problem."""
        manifests: Sequence[Manifest] = ()
        try:
            leases: Sequence[ReadLease] = await self._catalog.read_many.remote(tenant, memories, tag)
            if not leases:
                missing = f"no ready memory has the tag {tag!r}" if tag else "no memory is named"
                raise ProblemError(
                    404 if tag else 422, f"{missing}; give ids in 'memories', or a tag that memories have"
                )
            asked = await self._versions.of([lease.key for lease in leases])
            manifests = asked.manifests
            await self._limits.check(question)
            groups = await self._groups(asked) if question.task in READ_MEMORY else ()
            if question.task == "memory":
                await self._limits.check_answer_from_memory(asked, question)
            salt, seconds = salt_of(self._secret, tenant), min(lease.seconds for lease in leases)
            yield Inquiry(self._pools, asked, groups, question, salt, seconds)
        except Exception as error:
            raise await self._problem(manifests, error) from error

    async def _groups(self, asked: AskedVersions) -> Sequence[SegmentGroup]:
        model = await self._memory_model()
        for manifest in asked.manifests:
            require_same_model(manifest, model)
        return asked.groups

    async def _prefetch(self, manifest: Manifest) -> None:
        """Has the Recaller replica that a new version's questions are routed to bring its segments to that node.

        Never raises: the first question loads what could not be prefetched.
        """
        if self._profile.pools.memory.min_replicas == 0:
            return  # not woken for memories that nobody may ask about
        for group in segment_groups([manifest], self._profile.memory.group_slots):
            try:
                await self._pools.recaller.options(session_id=group.name).prefetch.remote(group)
            except Exception as error:  # noqa: BLE001  a boundary: see above
                logger.warning("%s is not prefetched: %r", group.name, error)

    async def _problem(self, manifests: Sequence[Manifest], error: BaseException) -> ProblemError:
        """The problem that `error` is to a client; where a file is damaged, what is being done about it."""
        if await self._repair(manifests, error):
            path = damaged_path(error)
            return ProblemError(503, f"the stored file {path!r} is damaged and is being made again; try again later")
        return problem_for(error)

    async def _repair(self, manifests: Sequence[Manifest], error: BaseException) -> bool:
        """Begins to make a damaged file again, if that is what is wrong and it can be done."""
        path = damaged_path(error)
        for manifest in manifests if path else ():
            if path in {file.path for file in manifest.files}:
                try:
                    return bool(await self._catalog.repair.remote(manifest.key, path))
                except Exception:  # a boundary: what was asked goes on, or fails, for its own reason
                    logger.exception("%s is damaged, and making it again could not be begun", path)
        return False


def router_deployment(profile: Profile) -> serve.Deployment:
    """The Router on the CPU pool of `profile`. One that is replaced ends its questions first."""
    options = profile.pools.cpu.deployment_options() | {"graceful_shutdown_timeout_s": profile.limits.question_s}
    return serve.deployment(Router, name="Router", **options)
