"""Runs real engines over real memories in a process of its own and prints, as JSON, what was seen.

`test_connector_parity.py` runs it and says what is right: `python -m tests.support.recall_scenarios FOLDER [long]`.
Each engine takes a while to start: with `long` those run that only `make test-long` has.
"""

import copy
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.support.recall_engine import IN_PROCESS

os.environ.update(IN_PROCESS)

import torch
from safetensors.torch import load_file

from benchmarks.support.random_model import ensure_random_model
from benchmarks.support.recall_engine import (
    Reference,
    Slots,
    connector_config,
    engine,
    group,
    ray_of_its_own,
    recalled,
    request,
    store_slots,
)
from memory_worker.messages import MemoryKey, SegmentGroup, SegmentRange
from memory_worker.models.beacon import BeaconModel
from memory_worker.storage.store import MemoryStore
from tests.support.stock_models import add_beacons, write_model

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
NEW_TOKENS = 24
BLOCK = 32
# Aligned to the block size, not aligned, one slot more than a block, less than a block.
SLOTS = {"aligned": 256, "unaligned": 250, "block-and-one": 33, "small": 20}
HEAD = 7


def main(folder: Path, long: bool) -> None:
    chance = random.Random(5)
    store = MemoryStore(str(folder / "store"))
    embedded = ensure_random_model(folder)
    seen: dict[str, Any] = {}
    with ray_of_its_own():
        memories = {name: memorized(embedded, slots, chance) for name, slots in SLOTS.items()}
        memories["twin"] = memorized(embedded, SLOTS["unaligned"], chance)
        for name, parts in memories.items():
            store_slots(store, key(name), parts)
        reference = Reference(embedded)
        questions = [[chance.randrange(4096) for _ in range(chance.randint(3, 40))] for _ in range(32)]
        ask = [(name, question) for i, question in enumerate(questions) for name in [list(SLOTS)[i % len(SLOTS)]]]
        caches = {name: reference.cache(parts) for name, parts in memories.items()}
        right = [reference.continued(copy.deepcopy(caches[name]), q, NEW_TOKENS) for name, q in ask]
        requests = [request(stored(name), question, NEW_TOKENS) for name, question in ask]

        if long:
            with engine(embedded, connector_config(store), dtype="bfloat16") as llm:
                seen["bfloat16"] = {"answered": sum(len(a) == NEW_TOKENS for a in recalled(llm, requests[:4]))}
            with engine(embedded, connector_config(store), tensor_parallel_size=2) as llm:
                answers = recalled(llm, requests[:8])
                seen["tensor_parallel"] = {
                    "right": same(answers, right[:8]),
                    "fetched": [stats["fetched"] for stats in llm.collective_rpc("recall_stats")],
                }
            with engine(embedded, connector_config(store, fingerprint="0" * 64)) as llm:
                seen["other_model"] = recalled(llm, requests[:2])
            made = write_model(folder / "qwen3", "qwen3", embedded, head_dim=64, initializer_range=1.0)
            seen["qwen3"] = qwen3(add_beacons(made), store)
        else:
            with engine(embedded, connector_config(store), block_size=BLOCK) as llm:
                answers = recalled(llm, requests)
                seen["concurrent"] = {"right": same(answers, right), "loads": worker(llm)}
                answers = recalled(llm, requests)
                seen["warm"] = {"right": same(answers, right), "loads": worker(llm)}
                seen["twins"] = twins(llm, reference, caches, questions[0])
                seen["composed"] = composed(llm, reference, memories, questions)
                seen["unsalted"] = recalled(llm, [request(stored("small"), questions[0], 4, salt=False)])
                seen["failures"] = failures(llm, store, requests, right)
            # 24 blocks hold 768 tokens: too few for all memories and questions at once.
            tight = {
                "block_size": BLOCK,
                "num_gpu_blocks_override": 24,
                "max_model_len": 512,
                "disable_log_stats": False,
            }
            with engine(embedded, connector_config(store), **tight) as llm:
                answers = [recalled(llm, requests) for _ in range(2)]
                seen["tight"] = {
                    "right": [same(a, right) for a in answers],
                    "preempted": preemptions(llm),
                    "loads": worker(llm),
                }
        if GOLDENS.exists():
            folders = sorted(GOLDENS.iterdir())
            folders = folders[1:] if long else folders[:1]
            seen["goldens"] = {path.name: goldens(path, store) for path in folders}
    print("SEEN", json.dumps(seen))


def key(memory: str) -> MemoryKey:
    return MemoryKey("tests", memory, "v000001-00000000")


def stored(memory: str) -> SegmentGroup:
    """All of it; the twin has as many slots as the memory it is a twin of."""
    return group(key(memory), 2, SLOTS.get(memory, SLOTS["unaligned"]))


def memorized(model: Path, slots: int, chance: random.Random) -> list[Slots]:
    """A head and two documents of random tokens, encoded after the head, that make `slots` slots."""
    beacon = BeaconModel.from_pretrained(model, dtype=torch.float32, device="cpu")
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


def twins(llm: Any, reference: Reference, caches: Any, question: list[int]) -> dict[str, Any]:
    """The same question to two memories of as many slots, one after the other and both at once."""
    names = ("unaligned", "twin")
    asked = [request(stored(name), question, NEW_TOKENS) for name in names]
    right = [reference.continued(copy.deepcopy(caches[name]), question, NEW_TOKENS) for name in names]
    apart = [recalled(llm, [one])[0] for one in asked]
    return {"differ": right[0] != right[1], "apart": same(apart, right), "together": same(recalled(llm, asked), right)}


def composed(llm: Any, reference: Reference, memories: dict[str, list[Slots]], questions: Any) -> dict[str, int]:
    """Segments of several memories behind the head of the first: whole memories, and parts in another order."""
    made = [
        (("unaligned", 0, 2), ("twin", 0, 2)),
        (("twin", 1, 2), ("small", 0, 1), ("aligned", 0, 2)),
        (("twin", 1, 2), ("small", 1, 2), ("aligned", 0, 2)),
    ]
    asked, right = [], []
    for number, ranges in enumerate(made):
        parts = [memories[ranges[0][0]][0]]
        for name, first, end in ranges:
            parts += memories[name][1 + first : 1 + end]
        slots = sum(keys.shape[2] for keys, _ in parts)
        one = SegmentGroup(tuple(SegmentRange(key(name), first, end) for name, first, end in ranges), slots)
        for question in (questions[0], questions[number + 1]):
            asked.append(request(one, question, NEW_TOKENS))
            right.append(reference.continued(reference.cache(parts), question, NEW_TOKENS))
    before = worker(llm)["fetched"]
    answers = recalled(llm, asked)
    return {
        "right": same(answers, right),
        "different": len({tuple(tokens) for tokens in right}),
        "fetched": int(worker(llm)["fetched"] - before),
    }


def failures(llm: Any, store: MemoryStore, requests: list[Any], right: list[Any]) -> dict[str, Any]:
    """A memory that is not there, one with other slots than asked for, one of another shape …; others go on."""
    question = [5, 6, 7]
    odd = torch.randn(4, 2, 40, 32), torch.randn(4, 2, 40, 32)  # 32 dimensions a head; the engine has 64
    store_slots(store, key("odd"), [odd, odd])
    late = [(torch.randn(4, 2, n, 64), torch.randn(4, 2, n, 64)) for n in (3, 47)]
    missing = request(group(key("late"), 1, 50), question, 4)
    bad = [missing, request(group(key("small"), 2, 21), question, 4), request(group(key("odd"), 1, 80), question, 4)]
    bad.append(request(group(key("nonsense"), 1, 1000), [], 4))  # nothing beside the memory
    bad.append(request(group(MemoryKey("tests", "bad/key", "x"), 1, 8), question, 4))
    bad.append(request(SegmentGroup((SegmentRange(key("small"), 1, 3),), 20), question, 4))
    foreign = MemoryKey("others", "small", "v000001-00000000")
    store_slots(store, foreign, late)
    bad.append(request(SegmentGroup((SegmentRange(key("small"), 0, 2), SegmentRange(foreign, 0, 1)), 67), question, 4))
    llm.reset_prefix_cache()
    answers = recalled(llm, [*bad, *requests])
    store_slots(store, key("late"), late)
    again = recalled(llm, [missing])[0]
    return {"answers": answers[: len(bad)], "others": same(answers[len(bad) :], right), "retried": len(again)}


def qwen3(model: Path, store: MemoryStore) -> dict[str, Any]:
    """Recalled over a memory of a Qwen3 checkpoint, by an engine that checks the fingerprint."""
    chance = random.Random(3)
    parts = memorized(model, 100, chance)
    fingerprint = BeaconModel.from_pretrained(model, device="cpu").fingerprint
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["long"])
