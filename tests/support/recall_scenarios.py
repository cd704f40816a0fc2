"""Real engines over memories of random tokens.

`engine_scenarios` runs them, and `test_connector_parity.py` says what is right.
"""

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.support.recall_engine import (
    Reference,
    Slots,
    connector_config,
    engine,
    group,
    recalled,
    request,
    store_slots,
)
from memory_worker.manifest import MemoryKey
from memory_worker.messages import SegmentGroup, SegmentRange
from memory_worker.models.beacon import BeaconModel
from memory_worker.storage.store import MemoryStore
from tests.support.stock_models import add_beacons, write_model

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
NEW_TOKENS = 24
BLOCK = 32
# Aligned to the block size, not aligned, one slot more than a block, less than a block.
SLOTS = {"aligned": 256, "unaligned": 250, "block-and-one": 33, "small": 20}
HEAD = 7


class Recalls:
    """Memories of a model, 32 questions to them, and what transformers answers."""

    def __init__(self, model: Path, store: MemoryStore) -> None:
        chance = random.Random(5)
        beacon = BeaconModel.from_pretrained(model, dtype=torch.float32, device="cpu")
        self.model, self.store, self.reference = model, store, Reference(model)
        self.fingerprint = beacon.fingerprint
        self.memories = {name: memorized(beacon, slots, chance) for name, slots in SLOTS.items()}
        self.memories["twin"] = memorized(beacon, SLOTS["unaligned"], chance)
        for name, parts in self.memories.items():
            self.keep(name, parts)
        self.questions = [[chance.randrange(4096) for _ in range(chance.randint(3, 40))] for _ in range(32)]
        ask = [(list(SLOTS)[i % len(SLOTS)], question) for i, question in enumerate(self.questions)]
        self.caches = {name: self.reference.cache(parts) for name, parts in self.memories.items()}
        self.right = [
            self.reference.continued(copy.deepcopy(self.caches[name]), question, NEW_TOKENS) for name, question in ask
        ]
        self.requests = [request(stored(name), question, NEW_TOKENS) for name, question in ask]

    def keep(self, name: str, parts: Sequence[Slots], tenant: str = "tests") -> None:
        store_slots(self.store, key(name, tenant), parts, self.fingerprint)

    def short(self, llm: Any) -> dict[str, Any]:
        """With an engine that nobody has asked yet."""
        seen: dict[str, Any] = {}
        answers = recalled(llm, self.requests)
        seen["concurrent"] = {"right": same(answers, self.right), "loads": worker(llm)}
        answers = recalled(llm, self.requests)
        seen["warm"] = {"right": same(answers, self.right), "loads": worker(llm)}
        seen["twins"] = twins(llm, self)
        seen["composed"] = composed(llm, self)
        seen["unsalted"] = recalled(llm, [request(stored("small"), self.questions[0], 4, salt=False)])
        return seen | {"failures": failures(llm, self)}

    def tight(self) -> dict[str, Any]:
        """24 blocks hold 768 tokens: too few for all memories and questions at once."""
        tight = {"num_gpu_blocks_override": 24, "max_model_len": 512, "disable_log_stats": False}
        with engine(self.model, connector_config(self.store), block_size=BLOCK, **tight) as llm:
            answers = [recalled(llm, self.requests) for _ in range(2)]
            return {
                "right": [same(a, self.right) for a in answers],
                "preempted": preemptions(llm),
                "loads": worker(llm),
            }

    def long(self) -> dict[str, Any]:
        """With engines that nothing else needs."""
        seen: dict[str, Any] = {}
        with engine(self.model, connector_config(self.store), dtype="bfloat16") as llm:
            answers = recalled(llm, self.requests[:4])
            seen["bfloat16"] = {"answered": sum(len(answer) == NEW_TOKENS for answer in answers)}
        with engine(self.model, connector_config(self.store), tensor_parallel_size=2) as llm:
            seen["tensor_parallel"] = {
                "right": same(recalled(llm, self.requests[:8]), self.right[:8]),
                "fetched": [stats["fetched"] for stats in llm.collective_rpc("recall_stats")],
            }
        return seen


def key(memory: str, tenant: str = "tests") -> MemoryKey:
    return MemoryKey(tenant, memory, "v000001-00000000")


def stored(memory: str) -> SegmentGroup:
    """All of it; the twin has as many slots as the memory it is a twin of."""
    return group(key(memory), 2, SLOTS.get(memory, SLOTS["unaligned"]))


def memorized(beacon: BeaconModel, slots: int, chance: random.Random) -> list[Slots]:
    """A head and two documents of random tokens, encoded after the head, that make `slots` slots."""
    head = beacon.compress([chance.randrange(4096) for _ in range(HEAD)], ratio=8, head=HEAD)
    first = (slots - HEAD) // 3
    parts = [head]
    for count in (first, slots - HEAD - first):
        tokens = [chance.randrange(4096) for _ in range(count * 8 - 3)]  # the last beacon stands for a remainder
        parts.append(beacon.compress(tokens, ratio=8, memory=head))
    assert sum(len(part) for part in parts) == slots
    return [(part.keys, part.values) for part in parts]


def same(answers: list[Any], right: list[list[int]]) -> int:
    return sum(answer == tokens for answer, tokens in zip(answers, right, strict=True))


def worker(llm: Any) -> dict[str, float]:
    return llm.collective_rpc("recall_stats")[0]


def preemptions(llm: Any) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def twins(llm: Any, of: Recalls) -> dict[str, Any]:
    """The same question to two memories of as many slots, one after the other and both at once."""
    names, question = ("unaligned", "twin"), of.questions[0]
    asked = [request(stored(name), question, NEW_TOKENS) for name in names]
    right = [of.reference.continued(copy.deepcopy(of.caches[name]), question, NEW_TOKENS) for name in names]
    apart = [recalled(llm, [one])[0] for one in asked]
    return {"differ": right[0] != right[1], "apart": same(apart, right), "together": same(recalled(llm, asked), right)}


def composed(llm: Any, of: Recalls) -> dict[str, int]:
    """Segments of several memories behind the head of the first: whole memories, and parts in another order."""
    made = [
        (("unaligned", 0, 2), ("twin", 0, 2)),
        (("twin", 1, 2), ("small", 0, 1), ("aligned", 0, 2)),
        (("twin", 1, 2), ("small", 1, 2), ("aligned", 0, 2)),
    ]
    asked, right = [], []
    for number, ranges in enumerate(made):
        parts = [of.memories[ranges[0][0]][0]]
        for name, first, end in ranges:
            parts += of.memories[name][1 + first : 1 + end]
        slots = sum(keys.shape[2] for keys, _ in parts)
        one = SegmentGroup(tuple(SegmentRange(key(name), first, end) for name, first, end in ranges), slots)
        for question in (of.questions[0], of.questions[number + 1]):
            asked.append(request(one, question, NEW_TOKENS))
            right.append(of.reference.continued(of.reference.cache(parts), question, NEW_TOKENS))
    before = worker(llm)["fetched"]
    answers = recalled(llm, asked)
    return {
        "right": same(answers, right),
        "different": len({tuple(tokens) for tokens in right}),
        "fetched": int(worker(llm)["fetched"] - before),
    }


def failures(llm: Any, of: Recalls) -> dict[str, Any]:
    """A memory that is not there, one with other slots than asked for, one of another shape …; others go on."""
    question = [5, 6, 7]
    odd = torch.randn(4, 2, 40, 32), torch.randn(4, 2, 40, 32)  # 32 dimensions a head; the engine has 64
    of.keep("odd", [odd, odd])
    late = [(torch.randn(4, 2, n, 64), torch.randn(4, 2, n, 64)) for n in (3, 47)]
    missing = request(group(key("late"), 1, 50), question, 4)
    bad = [missing, request(group(key("small"), 2, 21), question, 4), request(group(key("odd"), 1, 80), question, 4)]
    bad.append(request(group(key("nonsense"), 1, 1000), [], 4))  # nothing beside the memory
    bad.append(request(group(MemoryKey("tests", "bad/key", "x"), 1, 8), question, 4))
    bad.append(request(SegmentGroup((SegmentRange(key("small"), 1, 3),), 20), question, 4))
    foreign = key("small", "others")
    of.keep("small", late, "others")
    bad.append(request(SegmentGroup((SegmentRange(key("small"), 0, 2), SegmentRange(foreign, 0, 1)), 67), question, 4))
    llm.reset_prefix_cache()
    answers = recalled(llm, [*bad, *of.requests])
    of.keep("late", late)
    again = recalled(llm, [missing])[0]
    return {"answers": answers[: len(bad)], "others": same(answers[len(bad) :], of.right), "retried": len(again)}


def qwen3(folder: Path, tokenizer: Path, store: MemoryStore) -> dict[str, Any]:
    """Recalled over a memory of a Qwen3 checkpoint, by an engine that checks the fingerprint."""
    model = add_beacons(write_model(folder, "qwen3", tokenizer, head_dim=64, initializer_range=1.0))
    chance = random.Random(3)
    beacon = BeaconModel.from_pretrained(model, dtype=torch.float32, device="cpu")
    parts, fingerprint = memorized(beacon, 100, chance), beacon.fingerprint
    store_slots(store, key("qwen3"), parts, fingerprint)
    questions = [[chance.randrange(4096) for _ in range(9)] for _ in range(4)]
    reference = Reference(model)
    right = [reference.continued(reference.cache(parts), question, NEW_TOKENS) for question in questions]
    with engine(model, connector_config(store, fingerprint=fingerprint)) as llm:
        answers = recalled(llm, [request(group(key("qwen3"), 2, 100), question, NEW_TOKENS) for question in questions])
    return {"right": same(answers, right), "different": len({tuple(tokens) for tokens in right})}


def goldens(folder: Path, store: MemoryStore) -> dict[str, bool]:
    """The reference implementation's own memories and what it generated after them."""
    expected = load_file(folder / "expected.safetensors")
    cases = [case["name"] for case in json.loads((folder / "cases.json").read_text())["cases"] if case["question"]]
    with engine(folder / "model", connector_config(store), skip_tokenizer_init=True) as llm:
        asked, right = [], []
        for case in cases:
            keys, values = expected[f"{case}.keys"], expected[f"{case}.values"]
            name = MemoryKey("goldens", folder.name, f"v000001-{cases.index(case):08x}")
            split = keys.shape[2] // 2  # in two parts, as head and document
            store_slots(
                store, name, [(keys[:, :, :split], values[:, :, :split]), (keys[:, :, split:], values[:, :, split:])]
            )
            right.append(expected[f"{case}.greedy"].tolist())
            asked.append(request(group(name, 1, keys.shape[2]), expected[f"{case}.question"].tolist(), len(right[-1])))
        return {case: answer == r for case, answer, r in zip(cases, recalled(llm, asked), right, strict=True)}
