"""Measures what one replica of each deployment does on this machine: the rates that `memorag plan` counts with.

Every deployment is measured alone, through its handle, with as many calls at a time as keep it busy; what a question
costs each of them in CPU time is taken from whole answers, in which the pipeline calls them more often. The server
is one of its own, in a temporary folder, and is ended afterwards.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from cluster.planning.costs import PlanError, RankRates, estimate_memorizing, ranks_of, segment_tokens_of
from cluster.planning.plan import Rates
from serving.config import Profile, load_profile
from serving.planning.sizes import read_shape

if TYPE_CHECKING:
    from memory_worker.manifest import Manifest
    from retrieval_worker.messages import Passage

CLIENTS = 16  # calls at a time: enough to fill an engine's batches on small machines
_TENANT, _MEMORY = "default", "calibration"
_ASKED = itertools.count(0, 10_000)  # so that no answer comes from an engine's prefix cache
_BATCH = 256  # passages in one call to the Embedder


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was measured, and the server it was measured on, which runs until its `stop`."""

    rates: Rates
    stages: "Stages"
    loop: asyncio.AbstractEventLoop  # that the stages' handles belong to


def calibrate(
    profile_name: str, text: str, *, seconds: float, note: Callable[[str], None], then: Callable[[Calibrated], None]
) -> None:
    """Starts a server of that profile, memorizes `text`, measures each stage for about `seconds`, and calls `then`
    while the server still runs.

    Raises `PlanError` for a text of less than eight windows of its memory: it would measure overheads.
    """
    from serving.deploy.app import memories_root
    from serving.deploy.temporary import measure_on_server

    profile = load_profile(profile_name)

    async def measure(address: str, storage: str) -> None:
        note("memorizing the text …")
        stages = await Stages.of(profile, address, memories_root(storage), text)
        rates = await stages.rates(profile_name, seconds, note)
        await asyncio.to_thread(then, Calibrated(rates, stages, asyncio.get_running_loop()))

    note("starting a server …")
    measure_on_server(profile, measure)


@dataclass(frozen=True, slots=True)
class Stages:
    """The deployments of one server, and a memory to ask."""

    profile: Profile
    address: str
    storage_root: str
    handles: dict[str, Any]
    manifest: "Manifest"
    text: str

    @classmethod
    async def of(cls, profile: Profile, address: str, storage_root: str, text: str, memory: str = _MEMORY) -> "Stages":
        """Memorizes `text` on the server under that name. Raises `PlanError` where it is too short to measure with."""
        from ray import serve

        from memory_worker.storage.store import MemoryStore
        from serving.client.client import MemoRAG
        from serving.config import APPLICATION

        def memorize() -> None:
            with MemoRAG(address) as client:
                client.memorize(text=text, id=memory, progress=False)

        await asyncio.to_thread(memorize)
        names = ("Memorizer", "Recaller", "Embedder", "Retriever", "Generator")
        handles = {name: serve.get_deployment_handle(name, APPLICATION) for name in names}
        store = MemoryStore(storage_root)
        manifest = store.read_manifest(store.current(_TENANT, memory))
        described = await handles["Memorizer"].describe.remote()
        tokens, least = sum(each.tokens for each in manifest.documents), 8 * described.kinds[manifest.kind].window
        if tokens < least:
            raise PlanError(
                f"the text has {tokens:,} tokens, less than eight windows of its memory ({least:,}): give a longer one"
            )
        return cls(profile, address, storage_root, handles, manifest, text)

    async def of_text(self, memory: str, text: str) -> "Stages":
        """The same server with another text, memorized under that name."""
        return await Stages.of(self.profile, self.address, self.storage_root, text, memory)

    async def rates(self, profile_name: str, seconds: float, note: Callable[[str], None]) -> Rates:
        """Measures all stages, one after another."""
        (document,) = self.manifest.documents
        note("measuring the Memorizer …")
        flops = await self._memorizer(seconds)
        note("measuring the Recaller …")
        recalled, clues = await self._recaller(seconds)
        note("measuring Embedder and Retriever …")
        passages = await self._passages()
        embedded = await self._embedder([passage.text for passage in passages], seconds)
        searched = await self._retriever(clues, seconds)
        note("measuring the Generator …")
        generated, tokens = await self._generator(passages, seconds)
        note("measuring whole answers …")
        answered = await self.answer(seconds)
        characters = document.characters
        return Rates(
            profile=profile_name,
            machine=_machine(),
            memorize_kind=self.manifest.kind,
            memorize_flops=flops,
            recall_questions_per_s=recalled.per_s,
            embed_passages_per_s=embedded,
            search_questions_per_s=searched.per_s,
            search_texts=1 + len(clues),
            generate_tokens_per_s=generated.per_s * tokens,
            answer_tokens=tokens,
            characters_per_token=characters / document.tokens,
            passage_characters=characters / document.passage_count,
            passage_bytes=document.passages.size / document.passage_count,
            head_slots=len(self.manifest.head_tokens),
            recall_core_s=answered.core_s("Recaller"),
            search_core_s=answered.core_s("Embedder", "Retriever"),
            generate_core_s=answered.core_s("Generator") / tokens,
            route_core_s=answered.core_s("Router", "Ingress"),
        )

    async def memorize(self, seconds: float) -> "Busy":
        """The Memorizer alone on the whole text: reading it and writing its slots included."""
        from memory_worker.messages import MemorizeRequest, MemorizeResult
        from memory_worker.storage.store import MemoryStore

        store = MemoryStore(self.storage_root)
        memorize = self.handles["Memorizer"].options(stream=True).memorize

        async def once(number: int) -> None:
            key = store.new_version(_TENANT, self.manifest.memory)
            source = store.write_source(key, "text", self.text)
            request = MemorizeRequest(key, (source,), self.manifest.ratio, "en", kind=self.manifest.kind)
            steps = [step async for step in memorize.remote(request)]
            if not isinstance(steps[-1], MemorizeResult):
                raise RuntimeError("the Memorizer ended without a result")
            store.discard(key)

        return await _busy(once, 1, seconds)

    async def _memorizer(self, seconds: float) -> float:
        """Counted FLOP/s of one rank, over whole texts: reading them and writing their slots included."""
        described = await self.handles["Memorizer"].describe.remote()
        shape = read_shape(described.model, {})
        (document,) = self.manifest.documents
        kind, ratio, head = self.manifest.kind, self.manifest.ratio, len(self.manifest.head_tokens)
        flops = estimate_memorizing(
            shape,
            document.tokens,
            ratio=ratio,
            segment_tokens=segment_tokens_of(shape, kind, ratio, self.profile.memory.group_slots - head),
            ranks=1,
            group_windows=1,
            rates=RankRates(1.0, 1.0, 0.0),
            head_slots=head,
            kind=kind,
        ).flops
        return (await self.memorize(seconds)).per_s * flops / ranks_of(kind, self.profile.memory.memorize.ranks)

    async def _recaller(self, seconds: float) -> "tuple[Busy, list[str]]":
        """Questions a second, and the clues of one."""
        from memory_worker.messages import Clue, RecallRequest
        from memory_worker.recall.groups import segment_groups
        from serving.router.pipeline import CLUE_KINDS

        groups = segment_groups([self.manifest], self.profile.memory.group_slots)
        recall = self.handles["Recaller"].options(stream=True).recall
        clues: list[str] = []

        async def once(number: int) -> None:
            async def of(group: Any) -> list[str]:
                request = RecallRequest(group, _question(number), CLUE_KINDS["memorag"], "en")
                return [item.text async for item in recall.remote(request) if isinstance(item, Clue)]

            found = [clue for each in await asyncio.gather(*map(of, groups)) for clue in each]
            clues[:] = found or clues

        await once(0)
        return await _busy(once, CLIENTS, seconds), clues

    async def _passages(self) -> "list[Passage]":
        """Some passages of the memory, as a search finds them."""
        from serving.router.versions import index_of

        ranked = await self.handles["Retriever"].search.remote(index_of([self.manifest]), [_question(0)], _BATCH)
        hits = {hit.passage.id: hit.passage for ranking in ranked for hit in ranking.hits}
        return list(hits.values())

    async def _embedder(self, texts: list[str], seconds: float) -> float:
        async def once(number: int) -> None:
            await self.handles["Embedder"].embed.remote(texts)

        return (await _busy(once, 2, seconds)).per_s * len(texts)

    async def _retriever(self, clues: list[str], seconds: float) -> "Busy":
        """Questions a second: one search for the question and its clues, and the evidence of an answer."""
        from retrieval_worker.fusion import clue_weights, select_hits
        from retrieval_worker.messages import EvidenceRequest
        from serving.router.versions import index_of

        index, search, retriever = index_of([self.manifest]), self.profile.retrieval.search, self.handles["Retriever"]

        async def once(number: int) -> None:
            question = _question(number)
            queries = [question, *(f"{number} {clue}" for clue in clues)]
            ranked = await retriever.search.remote(index, queries)
            hits = select_hits(ranked, clue_weights(ranked, ranked[0].grounding), search)
            ids = tuple(hit.passage.id for hit in hits)
            await retriever.evidence.remote(EvidenceRequest(index, ids, question, " ".join(queries[1:3])))

        return await _busy(once, CLIENTS, seconds)

    async def _generator(self, passages: "list[Passage]", seconds: float) -> "tuple[Busy, float]":
        """Many answers, and tokens of one."""
        from generator_worker.messages import GenerateRequest, Generation, Source

        generate = self.handles["Generator"].options(stream=True).generate
        count = self.profile.retrieval.search.passages
        tokens: list[int] = []

        async def once(number: int) -> None:
            at = number % max(1, len(passages) - count)
            sources = tuple(Source(p.text) for p in passages[at : at + count])
            request = GenerateRequest("answer", _question(number), sources, "en", None, "calibration", stream=False)
            async for item in generate.remote(request):
                if isinstance(item, Generation):
                    tokens.append(item.completion_tokens)

        await once(0)
        busy = await _busy(once, CLIENTS, seconds)
        return busy, sum(tokens) / len(tokens)

    async def answer(self, seconds: float) -> "Busy":
        """Whole answers over HTTP, to questions that were not asked before."""
        import httpx

        offset = next(_ASKED)

        async with httpx.AsyncClient(base_url=self.address, timeout=300) as client:

            async def once(number: int) -> None:
                body = {"question": f"Once more, {_question(number + offset)}"}
                (await client.post(f"/v1/memories/{self.manifest.memory}/answer", json=body)).raise_for_status()

            return await _busy(once, CLIENTS, seconds)


@dataclass(frozen=True, slots=True)
class Busy:
    """A stretch of calls."""

    per_s: float
    calls: int
    cpu_s: dict[str, float]  # of each deployment's processes on this machine, meanwhile

    def core_s(self, *deployments: str) -> float:
        """CPU seconds of these for one call."""
        return sum(self.cpu_s.get(name, 0.0) for name in deployments) / self.calls


async def _busy(once: Callable[[int], Awaitable[None]], clients: int, seconds: float) -> Busy:
    """Calls with so many at a time; none begins after `seconds`."""
    before, began, count = _cpu_seconds(), time.perf_counter(), 0

    async def client() -> None:
        nonlocal count
        while time.perf_counter() - began < seconds:
            count += 1
            await once(count)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    passed, after = time.perf_counter() - began, _cpu_seconds()
    return Busy(count / passed, count, {name: spent - before.get(name, 0.0) for name, spent in after.items()})


def _cpu_seconds() -> dict[str, float]:
    """CPU seconds so far, by deployment, of replicas below this process and of the engines that they started."""
    spent: dict[str, float] = {}

    def add(process: psutil.Process, name: str | None) -> None:
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if "ServeReplica:" in title:
                name = title.split("ServeReplica:", 1)[1].split(":")[1].split(".")[0].split()[0]
            if name:
                times = process.cpu_times()
                spent[name] = spent.get(name, 0.0) + times.user + times.system
            for child in process.children():
                add(child, name)

    for child in psutil.Process().children():
        add(child, None)
    return spent


def _question(number: int) -> str:
    return f"What happened in the year {1200 + number}, and who was there?"


def _machine() -> str:
    """The processor and its cores, or the GPU, in words."""
    import os
    import platform

    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
