"""A memory ready to answer, from disk and from the object store, against memorizing its text again.

The embedded model in float32, a generated text of `--tokens` tokens. Ready means that a
question's first token is there, so the times hold the question's own computation too. From disk: neither the keeper
nor the engine has anything of the memory (the file is in the page cache, as after a restart of the server). From the
object store: the keeper has it, the engine has nothing. Memorizing again is `BeaconModel.compress` of the text alone,
without writing or loading, in a process of its own with torch's own choice of threads. Medians over memories of
different texts.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import ray

from benchmarks.report import make_parser, report
from benchmarks.support.random_model import ensure_random_model
from benchmarks.support.recall_engine import (
    IN_PROCESS,
    NAMESPACE,
    connector_config,
    engine,
    group,
    ray_of_its_own,
    recalled,
    request,
    store_slots,
)
from memory_worker.keeper.keeper import local_keeper
from memory_worker.manifest import MemoryKey
from memory_worker.models.beacon import BeaconModel
from memory_worker.storage.store import MemoryStore

HEAD, QUESTION, MEMORIES = 32, 24, 4
RATIO = 8
KEEPER_BYTES = 2**30


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the text")
    parser.add_argument("--ratios", type=int, nargs="+", default=[RATIO, 4, 16], help="the first gives the ratios")
    parser.add_argument("--memorize", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memorize:
        print(json.dumps({ratio: _memorize(arguments.memorize, ratio, arguments.tokens) for ratio in arguments.ratios}))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = ensure_random_model(folder)
        command = [sys.executable, "-m", "benchmarks.load", "--memorize", folder, "--tokens", str(arguments.tokens)]
        command += ["--ratios", *map(str, arguments.ratios)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        memorize = {int(ratio): seconds for ratio, seconds in json.loads(done.stdout.splitlines()[-1]).items()}
        os.environ.update(IN_PROCESS)  # before the engine's libraries are loaded
        rows = _load(Path(folder), model, memorize, arguments.tokens)
    disk, kept = rows[0]["disk over memorize"], rows[0]["object store over memorize"]
    report(
        "a memory ready to answer, against memorizing again",
        rows,
        {"disk_over_memorize": disk, "object_store_over_memorize": kept},
        arguments.json,
    )


def _memorize(folder: Path, ratio: int, tokens: int) -> float:
    """Stores the memories, and returns the seconds that one takes to be encoded."""
    beacon = BeaconModel.from_pretrained(ensure_random_model(folder), device="cpu")
    chance, seconds = random.Random(ratio), []
    head = beacon.compress([chance.randrange(3, 4096) for _ in range(HEAD)], ratio=ratio, head=HEAD)
    for index in range(MEMORIES):
        text = [chance.randrange(3, 4096) for _ in range(tokens)]
        began = time.perf_counter()
        made = beacon.compress(text, ratio=ratio, memory=head)
        seconds.append(time.perf_counter() - began)
        store_slots(_store(folder), _key(ratio, index), [(head.keys, head.values), (made.keys, made.values)])
    return median(seconds[1:])


def _load(folder: Path, model: Path, memorize: dict[int, float], tokens: int) -> list[dict[str, Any]]:
    store = _store(folder)
    with ray_of_its_own():
        keeper = local_keeper(store.storage.root, KEEPER_BYTES, NAMESPACE)
        longest = HEAD + tokens // min(memorize) + QUESTION + 8
        options = {"max_model_len": longest, "block_size": None}
        with engine(model, connector_config(store, keeper_budget_bytes=KEEPER_BYTES), **options) as llm:
            return [_row(llm, keeper, ratio, tokens, seconds) for ratio, seconds in memorize.items()]


def _row(llm: Any, keeper: Any, ratio: int, tokens: int, memorize: float) -> dict[str, Any]:
    slots, chance = HEAD + tokens // ratio, random.Random(0)
    disk, kept = [], []
    for index in range(MEMORIES):
        disk.append(_time_first_token(llm, keeper, _key(ratio, index), slots, chance))
        llm.reset_prefix_cache()
        kept.append(_time_first_token(llm, keeper, _key(ratio, index), slots, chance))
    from_disk, from_keeper = median(disk[1:]), median(kept[1:])  # the first warms code and allocators up
    return {
        "ratio": ratio,
        "text tokens": tokens,
        "slots": slots,
        "memorize again (ms)": memorize * 1e3,
        "from disk (ms)": from_disk * 1e3,
        "from the object store (ms)": from_keeper * 1e3,
        "disk over memorize": memorize / from_disk,
        "object store over memorize": memorize / from_keeper,
    }


def _time_first_token(llm: Any, keeper: Any, key: MemoryKey, slots: int, chance: random.Random) -> float:
    """Seconds until a question's first token, the keeper asked first as the Recaller does."""
    question = [chance.randrange(4096) for _ in range(QUESTION)]
    began = time.perf_counter()
    memory = ray.get(keeper.chunks.remote(group(key, 1, slots)))
    answer = recalled(llm, [request(memory.group, question, 1)])[0]
    assert len(answer) == 1, answer
    return time.perf_counter() - began


def _store(folder: Path) -> MemoryStore:
    return MemoryStore(f"{folder}/store")


def _key(ratio: int, index: int) -> MemoryKey:
    return MemoryKey("bench", f"ratio-{ratio}", f"v{index + 1:06d}-00000000")


if __name__ == "__main__":
    main()
