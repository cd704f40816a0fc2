"""Runs real engines over pruned memories whose heads share their slots and prints, as JSON, what was seen.

`test_head_budgets.py` runs it and says what is right: `python -m tests.support.head_scenarios FOLDER`.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.support.recall_engine import IN_PROCESS

os.environ.update(IN_PROCESS)

import torch

from benchmarks.support.random_model import ensure_random_model
from benchmarks.support.recall_engine import (
    Reference,
    connector_config,
    engine,
    group,
    ray_of_its_own,
    recalled,
    request,
    store_slots,
)
from memory_worker.head_pools import POOL_BLOCK, Counts
from memory_worker.manifest import MemoryKey
from memory_worker.memorize.kinds.pruned import choose_pairs, prune
from memory_worker.messages import SegmentGroup, SegmentRange
from memory_worker.models.beacon import BeaconModel, Slots
from memory_worker.storage.store import MemoryStore
from tests.support.masked import MaskedReference
from tests.support.stock_models import write_model

NEW_TOKENS, QUESTIONS, HEAD = 16, 16, 7
# Tokens of each document, and the ratio: one document, several and one too short for a block, whole blocks, almost
# everything dropped.
TEXTS = {"one": ((421,), 2), "several": ((300, 40, 230), 3), "blocks": ((384,), 4), "little": ((700, 300), 8)}


class Memory:
    """A memory of random texts, of which some heads keep much more than others; and all that was read of them."""

    def __init__(self, model: BeaconModel, documents: tuple[int, ...], ratio: int, chance: random.Random) -> None:
        made = torch.Generator().manual_seed(chance.randrange(2**31))
        ids = [chance.randrange(3, 4096) for _ in range(HEAD)]
        ((head,),) = model.compress_documents([ids], ratio=None)
        self.parts: list[Slots] = [head.slots]
        self.counts: list[Counts | None] = [None]
        self.read: list[tuple[Slots, torch.Tensor, int]] = [
            (head.slots, torch.ones(model.layers, model.kv_heads, HEAD, dtype=torch.bool), 0)
        ]
        for tokens in documents:
            text = [chance.randrange(3, 4096) for _ in range(tokens)]
            ((part,),) = model.compress_documents([text], ratio=None, memory=head.slots, group_windows=9)
            weight = torch.rand(model.layers, model.kv_heads, 1, generator=made) ** 4
            scores = weight * torch.rand(model.layers, model.kv_heads, tokens, generator=made)
            count = -(-tokens // ratio)
            kept, _, counts = prune(part.slots, scores, count, model.rope, together=model.kv_heads)
            seen, _ = choose_pairs(scores, count, model.kv_heads, POOL_BLOCK)
            self.parts.append(kept)
            self.counts.append(counts)
            self.read.append((part.slots, seen, count))

    @property
    def slots(self) -> int:
        return sum(map(len, self.parts))


def composed(reference: MaskedReference, read: Any, question: list[int]) -> list[int]:
    """What transformers says after `question` to segments behind one another, each at its own places."""
    places, slots = [], 0
    for part, _, count in read:
        slots += count or len(part)
        places.append(torch.arange(slots - len(part), slots))
    whole, seen = Slots.concat([part for part, _, _ in read]), torch.cat([shown for _, shown, _ in read], dim=2)
    return reference.continued(whole, torch.cat(places), seen, slots, question, NEW_TOKENS)


def main(folder: Path) -> None:
    chance = random.Random(5)
    store = MemoryStore(str(folder / "store"))
    path = write_model(
        folder / "llama", "llama", ensure_random_model(folder), hidden_size=192, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, initializer_range=0.25,
    )  # fmt: skip
    model = BeaconModel.from_pretrained(path)
    memories = {name: Memory(model, documents, ratio, chance) for name, (documents, ratio) in TEXTS.items()}
    questions = [[chance.randrange(3, 4096) for _ in range(chance.randint(3, 70))] for _ in range(QUESTIONS)]
    ask = [(name, question) for i, question in enumerate(questions) for name in [list(TEXTS)[i % len(TEXTS)]]]
    reference = MaskedReference(path)
    right = [composed(reference, memories[name].read, question) for name, question in ask]
    seen: dict[str, Any] = {
        "different": len({tuple(tokens) for tokens in right}),
        "spread": max(
            float(c.max() / c.mean()) for memory in memories.values() for c in memory.counts if c is not None
        ),
    }
    with ray_of_its_own():
        for name, memory in memories.items():
            parts = [(part.keys, part.values) for part in memory.parts]
            store_slots(store, key(name), parts, counts=memory.counts)
        plain = [(part.keys, part.values) for part in (memories["one"].read[0][0], memories["blocks"].read[1][0])]
        store_slots(store, key("plain"), plain)
        requests = [request(whole(name, memories[name]), question, NEW_TOKENS) for name, question in ask]
        others, others_right = beside(path, reference, memories, plain, questions)
        with engine(path, connector_config(store)) as llm:
            seen["cold"] = same(recalled(llm, requests), right)
            seen["warm"] = same(recalled(llm, requests), right)
            seen["mixed"] = same(recalled(llm, [*others, *requests]), [*others_right, *right])
            seen["fetched"] = llm.collective_rpc("recall_stats")[0]["fetched"]
        tight = {"num_gpu_blocks_override": 24, "max_model_len": 640, "disable_log_stats": False}
        with engine(path, connector_config(store), **tight) as llm:
            seen["tight"] = [same(recalled(llm, requests), right) for _ in range(2)]
            seen["preempted"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
            seen["tight-fetched"] = llm.collective_rpc("recall_stats")[0]["fetched"]
    print("SEEN", json.dumps(seen))


def beside(
    path: Path, reference: MaskedReference, memories: dict[str, Memory], plain: Any, questions: list[list[int]]
) -> tuple[list[Any], list[list[int]]]:
    """Requests of other sorts in the same batch: segments of two memories, a memory without budgets, and none."""
    from vllm import SamplingParams

    one, several = memories["one"], memories["several"]
    slots = one.slots + len(several.parts[2]) + len(several.parts[3])
    two = SegmentGroup((SegmentRange(key("one"), 0, 1), SegmentRange(key("several"), 1, 3)), slots)
    stock = Reference(path)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    requests = [
        request(two, questions[0], NEW_TOKENS),
        request(group(key("plain"), 1, sum(keys.shape[2] for keys, _ in plain)), questions[1], NEW_TOKENS),
        ({"prompt_token_ids": questions[2]}, greedy),
    ]
    return requests, [
        composed(reference, [*one.read, *several.read[2:]], questions[0]),
        stock.continued(stock.cache(plain), questions[1], NEW_TOKENS),
        stock.continued(
            stock.cache([(part[0][:, :, :0], part[1][:, :, :0]) for part in plain[:1]]), questions[2], NEW_TOKENS
        ),
    ]


def key(memory: str) -> MemoryKey:
    return MemoryKey("tests", memory, "v000001-00000000")


def whole(name: str, memory: Memory) -> SegmentGroup:
    return group(key(name), len(memory.parts) - 1, memory.slots)


def same(answers: list[Any], right: list[list[int]]) -> int:
    return sum(answer == tokens for answer, tokens in zip(answers, right, strict=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
