"""What a question's stream tells, with workers that answer at once."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from cluster.messages import TextDelta
from generator_worker.messages import GenerateRequest, Generation, SourcesRead
from retrieval_worker.config import SearchConfig
from retrieval_worker.messages import Evidence, EvidenceRequest, Hit, Index, Passage, Ranking
from serving import api
from serving.router.pipeline import Inquiry, Pools, Prepared
from serving.router.versions import AskedVersions

KEPT = (0, 2)  # of three passages


class Workers:
    async def search(self, index: Index, texts: list[str]) -> list[Ranking]:
        passages = [Passage(n, "m", "doc-1", 10 * n, 10 * n + 9, f"passage {n}", 3) for n in range(3)]
        return [Ranking(tuple(Hit(passage, 1.0) for passage in passages), 1.0) for _ in texts]

    async def prepare_evidence(self, index: Index, passages: tuple[int, ...]) -> bool:
        return True

    async def evidence(self, request: EvidenceRequest) -> list[Evidence]:
        return []

    async def generate(self, request: GenerateRequest) -> AsyncIterator[SourcesRead | TextDelta | Generation]:
        yield SourcesRead(KEPT)
        if request.stream:
            yield TextDelta("Two [2]", 2)
        yield Generation("Two [2]", (2,), 10, 2, "stop")


class Handle:
    def options(self, **_: object) -> "Handle":
        return self

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *asked: self._call(getattr(Workers(), name)(*asked)))

    def _call(self, result: Any) -> Any:
        return Items(result) if hasattr(result, "__aiter__") else result


class Items:
    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    def cancel(self) -> None:
        """Nothing goes on."""


def inquiry(*, stream: bool) -> Inquiry:
    async def on_damage(*_: object) -> bool:
        return False

    handle = cast(Any, Handle())
    storage = cast(Any, None)  # only `full` reads it
    pools = Pools(handle, handle, handle, SearchConfig(passages=3), 10.0, 60.0, 100, (), Prepared(), storage, on_damage)
    manifest = SimpleNamespace(memory="m", tenant="t", version="v1", language="en", title="")
    asked = cast(AskedVersions, SimpleNamespace(manifests=(manifest,), index=Index((), "m")))
    question = api.Question(question="How many?", task="rag", stream=stream)
    return Inquiry(pools, asked, (), question, "salt", 60.0)


async def test_passages_are_told_as_the_prompt_holds_them() -> None:
    """`[2]` in the answer is the second passage that was streamed, though one of three did not fit."""
    events = [event async for event in inquiry(stream=True).run()]
    told = [event.passage.id for event in events if isinstance(event, Hit)]
    answer = events[-1]
    assert isinstance(answer, api.Answer) and tuple(told) == KEPT
    assert [passage.start for passage in answer.passages] == [10 * n for n in KEPT]
    assert [(cited.n, cited.start) for cited in answer.citations] == [(2, 20)]
    assert [type(event) for event in events] == [Hit, Hit, TextDelta, api.Answer]


async def test_an_answer_in_one_piece_has_the_same_passages() -> None:
    events = [event async for event in inquiry(stream=False).run()]
    answer = events[-1]
    assert isinstance(answer, api.Answer) and [passage.start for passage in answer.passages] == [0, 20]
