"""Clues per second at 16 concurrent questions to one memory of 2,000 slots, against the reference way.

Ours is the Recaller as it is deployed: Ray Serve, vLLM in a process of its own on one core, 16 clients that each ask
their next question when the last is answered; all kinds of clues of a question run at once. The reference way is
transformers, with as many threads as are fastest: one question at a time, the memory's KV cache deep-copied for every
kind of clue, the kinds one after another. Same weights (the embedded model), float32, same prompts, same token
budget, greedy, ending at the same end-of-text token; both count distinct lines the same way, and with equal tokens
they find equal clues.
"""

import argparse
import asyncio
import copy
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ray import serve

from benchmarks.report import report
from cluster.config import EngineConfig
from cluster.pools import PoolConfig
from memory_worker.beacon import BeaconModel
from memory_worker.clues import ClueLines
from memory_worker.config import MemoryConfig, RecallConfig
from memory_worker.embedded import ensure_embedded_model
from memory_worker.messages import Clue, ClueKind, MemoryKey, RecallRequest
from memory_worker.prompts import head_tokens, question_tokens
from memory_worker.recaller import recaller_application
from memory_worker.store import MemoryStore
from tests.memory_worker.recalling import NAMESPACE, Reference, ray_of_its_own, store_slots

SLOTS, RATIO, CONCURRENT = 2000, 8, 16
BUDGET = 192  # tokens of one kind of clue
MAX_CLUES = 1000  # neither way stops early
KINDS: tuple[ClueKind, ...] = ("span", "question", "draft")
KEY = MemoryKey("bench", "text", "v000001-00000000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for rows and ratios")
    parser.add_argument("--rounds", type=int, default=6, help="questions that each of the 16 clients asks")
    parser.add_argument("--reference-questions", type=int, default=4, help="questions that the reference way answers")
    arguments = parser.parse_args()
    chance = random.Random(0)
    asked = [f"What happened at place {chance.randrange(10**6)}?" for _ in range(arguments.rounds * CONCURRENT)]
    with tempfile.TemporaryDirectory() as folder:
        from transformers import AutoTokenizer

        model = ensure_embedded_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(model)
        store = MemoryStore(f"{folder}/store")
        parts, fingerprint = _memorized(model, tokenizer, chance)
        store_slots(store, KEY, parts, fingerprint)
        theirs, compared = _reference(model, tokenizer, parts, asked[: arguments.reference_questions])
        with ray_of_its_own():
            serve.start(proxy_location="Disabled")
            handle = _deployed(model, store)
            ours, found = asyncio.run(_recaller(handle, asked))
            serve.shutdown()
    equal = sum(sorted(found[question]) == sorted(clues) for question, clues in compared.items())
    for row in (theirs, ours):
        row["clues/s"] = row["clues"] / row["seconds"]
        row["questions/s"] = row["questions"] / row["seconds"]
    ours["questions with equal clues"] = f"{equal} of {len(compared)}"
    report(
        f"recall: {CONCURRENT} concurrent questions, {SLOTS} slots",
        [theirs, ours],
        {"speedup": ours["clues/s"] / theirs["clues/s"]},
        arguments.json,
    )


def _memorized(model: Path, tokenizer: Any, chance: random.Random) -> tuple[Any, str]:
    beacon = BeaconModel.from_pretrained(model, dtype=torch.float32, device="cpu")
    tokens = head_tokens(tokenizer, "en")
    head = beacon.compress(tokens, ratio=RATIO, head=len(tokens))
    text = [chance.randrange(3, 4096) for _ in range((SLOTS - len(head)) * RATIO)]
    slots = beacon.compress(text, ratio=RATIO, memory=head)
    assert len(head) + len(slots) == SLOTS
    return [(head.keys, head.values), (slots.keys, slots.values)], beacon.fingerprint


def _reference(
    model: Path, tokenizer: Any, parts: Any, questions: list[str]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    reference = Reference(model)
    memory = reference.cache(parts)
    prompt = question_tokens(tokenizer, "span", "warm up", "en")
    speeds: dict[int, float] = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        reference.continued(copy.deepcopy(memory), prompt, 8)
        began = time.perf_counter()
        reference.continued(copy.deepcopy(memory), prompt, 64)
        speeds[threads] = time.perf_counter() - began
    torch.set_num_threads(min(speeds, key=speeds.__getitem__))
    found: dict[str, list[str]] = {}
    began = time.perf_counter()
    for question in questions:
        found[question] = []
        for kind in KINDS:
            prompt = question_tokens(tokenizer, kind, question, "en")
            cache = copy.deepcopy(memory)
            tokens = reference.continued(cache, prompt, BUDGET, end=tokenizer.eos_token_id)
            lines = ClueLines(MAX_CLUES)
            found[question] += lines.feed(tokenizer.decode(tokens, skip_special_tokens=True)) + lines.close()
    seconds = time.perf_counter() - began
    return _row("transformers, one by one", questions, found, seconds), found


def _deployed(model: Path, store: MemoryStore) -> Any:
    config = MemoryConfig(
        engine=EngineConfig(model=str(model), dtype="float32", max_model_len=4096, enforce_eager=True, cpu_cores="0"),
        recall=RecallConfig(max_clue_tokens=BUDGET, max_clues=MAX_CLUES),
    )
    root = store.storage.root
    application = recaller_application(config, PoolConfig(), storage_root=root, namespace=NAMESPACE, secret=b"bench")
    return serve.run(application, name="recall", route_prefix=None).options(stream=True)


async def _recaller(handle: Any, questions: list[str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    async def ask(question: str) -> list[str]:
        request = RecallRequest(KEY, SLOTS, question, KINDS, "en")
        return [item.text async for item in handle.recall.remote(request) if isinstance(item, Clue)]

    await asyncio.gather(*(ask(f"warm up {i}") for i in range(CONCURRENT)))
    found: dict[str, list[str]] = {}
    waiting = iter(questions)

    async def client() -> None:
        for question in waiting:
            found[question] = await ask(question)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONCURRENT)))
    seconds = time.perf_counter() - began
    return _row(f"Recaller, {CONCURRENT} at once", questions, found, seconds), found


def _row(way: str, questions: list[str], found: dict[str, list[str]], seconds: float) -> dict[str, Any]:
    return {"way": way, "questions": len(questions), "clues": sum(map(len, found.values())), "seconds": seconds}


if __name__ == "__main__":
    main()
