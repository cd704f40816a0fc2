"""The Recaller as it is deployed: real Ray Serve, real vLLM in its own process, a memory in the store."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve

from benchmarks.support.recall_engine import NAMESPACE, Reference, group, store_slots
from cluster.config import EngineConfig
from cluster.messages import Finished, TextDelta
from cluster.pools.pools import PoolConfig
from memory_worker.config import KeeperConfig, MemoryConfig, RecallConfig
from memory_worker.errors import MemoryNotFound, MemoryTooLarge, QuestionTooLong
from memory_worker.keeper.keeper import local_keeper
from memory_worker.manifest import MemoryKey
from memory_worker.messages import Clue, MemoryAnswerRequest, RecallRequest, RecallUsage, SegmentGroup, SegmentRange
from memory_worker.models.beacon import BeaconModel
from memory_worker.models.prompts import head_tokens, question_tokens
from memory_worker.recall.application import recaller_application
from memory_worker.recall.clues import ClueLines
from memory_worker.storage.store import MemoryStore
from tests.support.waiting import until

KEY = MemoryKey("tests", "book", "v000001-00000000")
RECALL = RecallConfig(max_clue_tokens=96, max_clues=3)
MAX_MODEL_LEN = 2048
TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n" * 40
QUESTION = "Who opened the gate?"
KINDS = ("span", "question", "draft")


class Deployed:
    """What the tests need of the running Recaller."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.store = MemoryStore(str(folder / "store"))
        self.reference = Reference(self.model)
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
        beacon = BeaconModel.from_pretrained(self.model, dtype=torch.float32, device="cpu")
        tokens = head_tokens(self.tokenizer, "en")
        head = beacon.compress(tokens, ratio=8, head=len(tokens))
        text = beacon.compress(self.tokenizer.encode(TEXT, add_special_tokens=False), ratio=8, memory=head)
        self.parts = [(head.keys, head.values), (text.keys, text.values)]
        self.slots = len(head) + len(text)
        self.fingerprint = beacon.fingerprint
        store_slots(self.store, KEY, self.parts, self.fingerprint)
        config = MemoryConfig(
            engine=EngineConfig(
                model=str(self.model),
                dtype="float32",
                max_model_len=MAX_MODEL_LEN,
                block_size=32,
                enforce_eager=True,
                cpu_cores="0",
            ),
            recall=RECALL,
            keeper=KeeperConfig(budget_bytes=64 * 2**20),
        )
        application = recaller_application(
            config, PoolConfig(), storage_root=self.store.storage.root, namespace=NAMESPACE, secret=b"secret"
        )
        self.handle = serve.run(application, name="recaller", route_prefix=None)

    def request(self, question: str = QUESTION, key: MemoryKey = KEY, **changes: Any) -> RecallRequest:
        asked = changes.get("group", group(key, 1, changes.get("slots", self.slots)))
        return RecallRequest(asked, question, changes.get("kinds", KINDS), "en")

    async def recall(self, request: RecallRequest) -> list[Clue | RecallUsage]:
        return [item async for item in self.handle.options(stream=True).recall.remote(request)]

    def expected(self, kind: Any, question: str, parts: Any = None) -> list[str]:
        prompt = question_tokens(self.tokenizer, kind, question, "en")
        tokens = self.reference.continued(self.reference.cache(parts or self.parts), prompt, RECALL.max_clue_tokens)
        if self.tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
        lines = ClueLines(RECALL.max_clues)
        return lines.feed(self.tokenizer.decode(tokens)) + lines.close()

    async def idle(self) -> None:
        """Returns when neither the engine's front nor its scheduler knows of any request."""

        async def knows_none() -> bool:
            stats = await self.handle.stats.remote()
            return not stats.requests and not stats.working

        await until(knows_none)


@pytest.fixture(scope="module")
def deployed(local_ray: None, random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return Deployed(random_model, tmp_path_factory.mktemp("recaller"))


async def test_all_kinds_of_clues_come_as_transformers_would_write_them(deployed: Deployed) -> None:
    items = await deployed.recall(deployed.request())
    usage = items.pop()
    assert isinstance(usage, RecallUsage)
    found = {kind: [item.text for item in items if isinstance(item, Clue) and item.kind == kind] for kind in KINDS}
    assert found == {kind: deployed.expected(kind, QUESTION) for kind in KINDS}
    assert all(found.values())
    prompts = [len(question_tokens(deployed.tokenizer, kind, QUESTION, "en")) for kind in KINDS]
    assert usage.prompt_tokens == 3 * deployed.slots + sum(prompts)
    assert 0 < usage.completion_tokens <= 3 * RECALL.max_clue_tokens


async def test_many_questions_at_once_load_the_memory_once(deployed: Deployed) -> None:
    answers = await asyncio.gather(*(deployed.recall(deployed.request(f"Question {i}?")) for i in range(8)))
    assert all(isinstance(items[-1], RecallUsage) for items in answers)
    assert (await deployed.handle.worker_stats.remote())["fetched"] == 1


async def test_key_points_need_no_question(deployed: Deployed) -> None:
    items = await deployed.recall(deployed.request("", kinds=("key_point",)))
    clues = [item.text for item in items if isinstance(item, Clue)]
    assert clues == deployed.expected("key_point", "")


async def test_an_answer_from_memory_streams(deployed: Deployed) -> None:
    request = MemoryAnswerRequest(group(KEY, 1, deployed.slots), QUESTION, "en", max_tokens=12)
    items = [item async for item in deployed.handle.options(stream=True).answer.remote(request)]
    end = items.pop()
    assert isinstance(end, Finished) and end.completion_tokens <= 12
    assert len(items) > 1 and all(isinstance(item, TextDelta) for item in items)
    prompt = question_tokens(deployed.tokenizer, "answer", QUESTION, "en")
    tokens = deployed.reference.continued(deployed.reference.cache(deployed.parts), prompt, 12)
    assert "".join(item.text for item in items) == deployed.tokenizer.decode(tokens, skip_special_tokens=True)


async def test_closing_the_stream_ends_the_work_in_the_engine(deployed: Deployed) -> None:
    await deployed.idle()
    request = MemoryAnswerRequest(
        group(KEY, 1, deployed.slots), "Why?", "en", max_tokens=MAX_MODEL_LEN - deployed.slots - 200
    )
    stream = deployed.handle.options(stream=True).answer.remote(request)
    assert isinstance(await anext(stream), TextDelta)
    assert (await deployed.handle.stats.remote()).requests == 1
    stream.cancel()
    await deployed.idle()


async def test_what_cannot_be_asked_is_a_clear_error(deployed: Deployed) -> None:
    with pytest.raises(QuestionTooLong, match=f"beside {deployed.slots} memory slots .* {MAX_MODEL_LEN} tokens leave"):
        await deployed.recall(deployed.request("why " * 3000))
    with pytest.raises(MemoryTooLarge, match="has 2000 slots"):
        await deployed.recall(deployed.request(slots=2000))
    with pytest.raises(MemoryNotFound):
        await deployed.recall(deployed.request(key=MemoryKey("tests", "nobody", "v000001-00000000")))
    with pytest.raises(ValueError, match="counts 10 slots"):
        await deployed.recall(deployed.request(slots=10))
    assert (await deployed.handle.stats.remote()).alive


async def test_several_memories_are_asked_together(deployed: Deployed) -> None:
    second = MemoryKey("tests", "second", "v000001-00000000")
    store_slots(deployed.store, second, deployed.parts, deployed.fingerprint)
    text = deployed.parts[1]
    both = SegmentGroup((SegmentRange(KEY, 0, 1), SegmentRange(second, 0, 1)), deployed.slots + text[0].shape[2])
    items = await deployed.recall(deployed.request(group=both, kinds=("span",)))
    parts = [*deployed.parts, text]
    assert [i.text for i in items if isinstance(i, Clue)] == deployed.expected("span", QUESTION, parts)
    with pytest.raises(MemoryTooLarge, match="'book, second' has 2000 slots"):
        await deployed.recall(deployed.request(group=SegmentGroup(both.ranges, 2000)))
    foreign = SegmentGroup((SegmentRange(MemoryKey("others", "book", KEY.version), 0, 1), *both.ranges), 100)
    with pytest.raises(ValueError, match="segments of one tenant"):
        await deployed.recall(deployed.request(group=foreign))


async def test_a_keeper_that_died_is_not_noticed(deployed: Deployed) -> None:
    keeper = local_keeper(deployed.store.storage.root, 64 * 2**20, NAMESPACE)
    other = MemoryKey("tests", "other", "v000001-00000000")
    store_slots(deployed.store, other, deployed.parts, deployed.fingerprint)
    ray.kill(keeper, no_restart=False)
    items = await deployed.recall(deployed.request(key=other))
    assert [i.text for i in items if isinstance(i, Clue) and i.kind == "span"] == deployed.expected("span", QUESTION)
