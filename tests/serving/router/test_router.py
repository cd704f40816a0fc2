"""Questions through the Router and the Catalog, with pools that answer at once: what is sent, and what is survived."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from benchmarks.manifests import Workers, made_manifest
from cluster.errors import EngineFailed
from cluster.storage.durable import DamagedFile, StorageFull
from memory_worker.catalog.catalog import Catalog
from memory_worker.errors import QueueFull
from memory_worker.messages import Clue, RecallRequest, RecallUsage
from memory_worker.storage.store import MemoryStore
from retrieval_worker.messages import EvidenceRequest, Index, Ranking
from serving import api
from serving.config import load_profile
from serving.errors import ProblemError
from serving.router import router as router_module
from serving.router.router import Router
from tests.support.stand_in_handles import Handle

QUESTION = api.Question(question="How many times was the gate opened?", max_tokens=8)


class Pools(Workers):
    """Answers at once, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int, bool]] = []  # method, bytes of its arguments, whether with an index's parts
        self.recall_error: Exception | None = None

    def note(self, method: str, index: Index | None, *rest: Any) -> None:
        self.asked.append((method, len(cloudpickle.dumps((index, rest))), bool(index and index.parts)))

    async def recall(self, request: RecallRequest) -> AsyncIterator[Clue | RecallUsage]:
        self.note("recall", None, request)
        if self.recall_error:
            raise self.recall_error
        async for item in super().recall(request):
            yield item

    async def search(self, index: Index, texts: list[str]) -> list[Ranking] | None:
        self.note("search", index, texts)
        return await super().search(index, texts)

    async def evidence(self, request: EvidenceRequest) -> Any:
        self.note("evidence", request.index, request.passages)
        return await super().evidence(request)

    def forget(self) -> None:
        """As a replica that has just started."""
        self._open.clear()
        self.asked.clear()


@pytest.fixture
def pools() -> Pools:
    return Pools()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    store = MemoryStore(str(tmp_path))
    store.publish(made_manifest(1))
    store.publish(made_manifest(500))
    return Catalog(str(tmp_path))


@pytest.fixture
async def router(tmp_path: Path, pools: Pools, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(router_module, "catalog", lambda *_: Handle(catalog))
    handle: Any = Handle(pools)
    profile = load_profile("embedded")
    engine = profile.memory.engine.model_copy(update={"max_model_len": 6000})  # holds one of the memories
    memory = profile.memory.model_copy(update={"engine": engine})
    router = Router(
        profile.model_copy(update={"memory": memory}), str(tmp_path), b"s" * 32, (), handle, handle, handle, handle
    )
    yield router
    router._working.cancel()
    await asyncio.gather(router._working, return_exceptions=True)


async def test_an_index_is_sent_whole_once_and_then_named(router: Router, pools: Pools) -> None:
    for memory in ("memory-1", "memory-500"):
        answer = await router.answer("bench", [memory], None, QUESTION)
        assert answer.passages and answer.clues and answer.degraded == []
        assert [whole for method, _, whole in pools.asked if method == "search"][:2] == [False, True]
        pools.asked.clear()
    sizes: dict[str, int] = {}
    for memory in ("memory-1", "memory-500"):
        await router.answer("bench", [memory], None, QUESTION)
        assert not any(whole for _, _, whole in pools.asked)
        sizes[memory] = sum(size for _, size, _ in pools.asked)
        pools.asked.clear()
    assert sizes["memory-500"] < 1.1 * sizes["memory-1"]
    pools.forget()
    assert (await router.answer("bench", ["memory-500"], None, QUESTION)).passages, "a new replica is told the parts"


async def test_nobody_is_asked_what_does_not_fit(router: Router, pools: Pools) -> None:
    question = QUESTION.model_copy(update={"task": "memory"})
    with pytest.raises(ProblemError, match=r"what is asked has 8,030 slots, .* window of 6,000 tokens"):
        await router.answer("bench", ["memory-1", "memory-500"], None, question)
    assert pools.asked == []


@pytest.mark.parametrize("refusal", [QueueFull(3), StorageFull("/there"), EngineFailed("gone")])
async def test_damage_that_cannot_be_mended_now_costs_the_clues_and_not_the_answer(
    router: Router, pools: Pools, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    path = made_manifest(1).documents[0].segments[0].files[0].path
    pools.recall_error = DamagedFile(path, "does not match its SHA-256")

    async def refuse(*_: object) -> None:
        raise refusal

    monkeypatch.setattr(catalog, "begin", refuse)
    answer = await router.answer("bench", ["memory-1"], None, QUESTION)
    assert answer.degraded == ["recall"] and answer.passages and answer.answer
    with pytest.raises(ProblemError, match="does not match its SHA-256") as problem:
        await router.clues("bench", "memory-1", api.CluesQuery(question="Who?"))
    assert problem.value.status == 500


async def test_lists_leave_out_what_was_deleted_meanwhile(
    router: Router, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = await router.list_memories("bench", None, 10, None)
    assert [(memory.id, len(memory.documents)) for memory in listed.memories] == [("memory-1", 1), ("memory-500", 500)]
    records = await catalog.list("bench")

    async def stale(*_: object) -> Any:
        return records

    monkeypatch.setattr(catalog, "list", stale)
    await catalog.delete("bench", "memory-1")
    router._versions._kept._tasks.clear()
    assert [memory.id for memory in (await router.list_memories("bench", None, 10, None)).memories] == ["memory-500"]
