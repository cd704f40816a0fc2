"""Clues per second at 16 concurrent questions to one memory of 2,000 slots, against the reference way.

Ours is the Recaller as it is deployed: Ray Serve, vLLM in a process of its own, 16 clients that each ask their next
question when the last is answered; all kinds of clues of a question run at once. Both may use all cores. The
reference way is transformers, with as many threads as are fastest: one question at a time, the memory's KV cache
deep-copied for every kind of clue, the kinds one after another. Same weights (the embedded model), float32, same
prompts, same token budget, greedy, ending at the same end-of-text token; both count distinct lines the same way, and
with equal tokens they find equal clues. The two take turns, so that a busy machine slows both down.
"""

import asyncio
import copy
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ray import serve

from benchmarks.report import make_parser, report
from benchmarks.support.random_model import ensure_random_model
from benchmarks.support.recall_engine import NAMESPACE, Reference, group, ray_of_its_own, store_slots
from cluster.config import EngineConfig
from cluster.pools.pools import PoolConfig
from memory_worker.config import MemoryConfig, RecallConfig
from memory_worker.manifest import MemoryKey
from memory_worker.messages import Clue, ClueKind, RecallRequest
from memory_worker.models.beacon import BeaconModel
from memory_worker.models.prompts import head_tokens, question_tokens
from memory_worker.recall.application import recaller_application
from memory_worker.recall.clues import ClueLines
from memory_worker.storage.store import MemoryStore

SLOTS, RATIO, CONCURRENT = 2000, 8, 16
REFERENCE_QUESTIONS = 4  # of each turn's
BUDGET = 192  # tokens of one kind of clue
MAX_CLUES = 1000  # neither way stops early
KINDS: tuple[ClueKind, ...] = ("span", "question", "draft")
KEY = MemoryKey("bench", "text", "v000001-00000000")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="times that both ways take turns")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = ensure_random_model(folder)
        store = MemoryStore(f"{folder}/store")
        reference = ReferenceWay(model)
        store_slots(store, KEY, reference.parts, reference.fingerprint)
        with ray_of_its_own():
            serve.start(proxy_location="Disabled")
            handle = _deploy(model, store)
            theirs, ours, equal = asyncio.run(_in_turns(reference, handle, arguments.rounds))
            serve.shutdown()
    rows = [_row("transformers, one by one", theirs), _row(f"Recaller, {CONCURRENT} at once", ours)]
    rows[0]["questions with equal clues"], rows[1]["questions with equal clues"] = (
        "",
        f"{equal} of {rows[0]['questions']}",
    )
    speedup = rows[1]["clues/s"] / rows[0]["clues/s"]
    title = f"recall: {CONCURRENT} concurrent questions, {SLOTS} slots"
    report(title, rows, {"speedup": speedup}, arguments.json)


class Turn(NamedTuple):
    """What one way did in its turn."""

    questions: int
    clues: int
    seconds: float


async def _in_turns(reference: "ReferenceWay", handle: Any, rounds: int) -> tuple[list[Turn], list[Turn], int]:
    """Turns of the reference way and of ours; how many of its questions had equal clues here."""
    theirs, ours, equal = [], [], 0
    await _ask(handle, [f"Warm up {i}?" for i in range(CONCURRENT)])
    for turn in range(rounds):
        questions = [f"What happened at place {turn}-{i}?" for i in range(4 * CONCURRENT)]
        began = time.perf_counter()
        expected = {question: reference.clues(question) for question in questions[:REFERENCE_QUESTIONS]}
        theirs.append(Turn(len(expected), sum(map(len, expected.values())), time.perf_counter() - began))
        began = time.perf_counter()
        found = await _ask(handle, questions)
        ours.append(Turn(len(found), sum(map(len, found.values())), time.perf_counter() - began))
        equal += sum(sorted(found[question]) == sorted(clues) for question, clues in expected.items())
    return theirs, ours, equal


class ReferenceWay:
    """The memory, and transformers over it."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        chance = random.Random(0)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        beacon = BeaconModel.from_pretrained(model, dtype=torch.float32, device="cpu")
        tokens = head_tokens(self._tokenizer, "en")
        head = beacon.compress(tokens, ratio=RATIO, head=len(tokens))
        text = [chance.randrange(3, 4096) for _ in range((SLOTS - len(head)) * RATIO)]
        slots = beacon.compress(text, ratio=RATIO, memory=head)
        self.parts = [(head.keys, head.values), (slots.keys, slots.values)]
        self.fingerprint = beacon.fingerprint
        self._reference = Reference(model)
        self._memory = self._reference.cache(self.parts)
        self._choose_threads()

    def clues(self, question: str) -> list[str]:
        found: list[str] = []
        for kind in KINDS:
            lines = ClueLines(MAX_CLUES)
            text = self._tokenizer.decode(self._continue(kind, question, BUDGET), skip_special_tokens=True)
            found += lines.feed(text) + lines.close()
        return found

    def _continue(self, kind: ClueKind, question: str, tokens: int) -> list[int]:
        prompt = question_tokens(self._tokenizer, kind, question, "en")
        cache = copy.deepcopy(self._memory)
        return self._reference.continued(cache, prompt, tokens, end=self._tokenizer.eos_token_id)

    def _choose_threads(self) -> None:
        speeds: dict[int, float] = {}
        for threads in {1, torch.get_num_threads()}:
            torch.set_num_threads(threads)
            self._continue("span", "warm up", 8)
            began = time.perf_counter()
            self._continue("span", "warm up", 64)
            speeds[threads] = time.perf_counter() - began
        torch.set_num_threads(min(speeds, key=speeds.__getitem__))


def _deploy(model: Path, store: MemoryStore) -> Any:
    config = MemoryConfig(
        engine=EngineConfig(
            model=str(model),
            dtype="float32",
            max_model_len=4096,
            block_size=32,
            enforce_eager=True,
            cpu_cores=f"0-{max(os.sched_getaffinity(0))}",
        ),
        recall=RecallConfig(max_clue_tokens=BUDGET, max_clues=MAX_CLUES),
    )
    root = store.storage.root
    application = recaller_application(config, PoolConfig(), storage_root=root, namespace=NAMESPACE, secret=b"bench")
    return serve.run(application, name="recall", route_prefix=None).options(stream=True)


async def _ask(handle: Any, questions: list[str]) -> dict[str, list[str]]:
    """The clues of each question, asked by as many clients as there are concurrent questions."""
    found: dict[str, list[str]] = {}
    waiting = iter(questions)

    async def client() -> None:
        for question in waiting:
            stream = handle.recall.remote(RecallRequest(group(KEY, 1, SLOTS), question, KINDS, "en"))
            found[question] = [item.text async for item in stream if isinstance(item, Clue)]

    await asyncio.gather(*(client() for _ in range(CONCURRENT)))
    return found


def _row(way: str, turns: list[Turn]) -> dict[str, Any]:
    seconds = sum(turn.seconds for turn in turns)
    return {
        "way": way,
        "questions": sum(turn.questions for turn in turns),
        "clues": sum(turn.clues for turn in turns),
        "seconds": seconds,
        "clues/s": sum(turn.clues for turn in turns) / seconds,
        "questions/s": sum(turn.questions for turn in turns) / seconds,
    }


if __name__ == "__main__":
    main()
