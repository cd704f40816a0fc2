"""A memory ready to answer, from disk and from the object store, against memorizing its text again.

The embedded model in float32, a generated text of `--tokens` tokens, one thread for everything. Ready means that a
question's first token is there, so the times hold the question's own computation too. From disk: neither the keeper
nor the engine has anything of the memory (the file is in the page cache, as after a restart of the server). From the
object store: the keeper has it, the engine has nothing. Memorizing again is `BeaconModel.compress` of the text alone,
without writing or loading. Medians over memories of different texts.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.memory_worker.recalling import IN_PROCESS

os.environ.update(IN_PROCESS)

import ray

from benchmarks.report import report
from memory_worker.beacon import BeaconModel
from memory_worker.embedded import ensure_embedded_model
from memory_worker.keeper import local_keeper
from memory_worker.messages import MemoryKey
from memory_worker.store import MemoryStore
from tests.memory_worker.recalling import (
    NAMESPACE,
    connector_config,
    engine,
    ray_of_its_own,
    recalled,
    request,
    store_slots,
)

HEAD, QUESTION, MEMORIES = 32, 24, 4
RATIO = 8
KEEPER_BYTES = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for rows and ratios")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the text")
    parser.add_argument("--ratios", type=int, nargs="+", default=[RATIO, 4, 16], help="the first gives the ratios")
    arguments = parser.parse_args()
    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ray_of_its_own():
        model = ensure_embedded_model(folder)
        beacon = BeaconModel.from_pretrained(model, device="cpu")
        store = MemoryStore(f"{folder}/store")
        keeper = local_keeper(store.storage.root, KEEPER_BYTES, NAMESPACE)
        longest = HEAD + arguments.tokens // min(arguments.ratios) + QUESTION + 8
        options = {"max_model_len": longest, "block_size": None}
        with engine(model, connector_config(store, keeper_budget_bytes=KEEPER_BYTES), **options) as llm:
            for ratio in arguments.ratios:
                rows.append(_measured(llm, beacon, store, keeper, ratio, arguments.tokens, chance))
    disk, kept = rows[0]["disk over memorize"], rows[0]["object store over memorize"]
    report(
        "a memory ready to answer, against memorizing again",
        rows,
        {"disk_over_memorize": disk, "object_store_over_memorize": kept},
        arguments.json,
    )


def _measured(
    llm: Any, beacon: BeaconModel, store: MemoryStore, keeper: Any, ratio: int, tokens: int, chance: random.Random
) -> dict[str, Any]:
    memorize, disk, kept = [], [], []
    head_tokens = [chance.randrange(3, 4096) for _ in range(HEAD)]
    head = beacon.compress(head_tokens, ratio=ratio, head=HEAD)
    slots = 0
    for index in range(MEMORIES):
        text = [chance.randrange(3, 4096) for _ in range(tokens)]
        began = time.perf_counter()
        made = beacon.compress(text, ratio=ratio, memory=head)
        memorize.append(time.perf_counter() - began)
        key = MemoryKey("bench", f"ratio-{ratio}", f"v{index:06d}-00000000")
        store_slots(store, key, [(head.keys, head.values), (made.keys, made.values)])
        slots = HEAD + len(made)
        disk.append(_ready(llm, keeper, key, slots, chance))
        llm.reset_prefix_cache()
        kept.append(_ready(llm, keeper, key, slots, chance))
    # The first of each warms code and allocators up.
    row = {"memorize": median(memorize[1:]), "disk": median(disk[1:]), "kept": median(kept[1:])}
    return {
        "ratio": ratio,
        "text tokens": tokens,
        "slots": slots,
        "memorize again (ms)": row["memorize"] * 1e3,
        "from disk (ms)": row["disk"] * 1e3,
        "from the object store (ms)": row["kept"] * 1e3,
        "disk over memorize": row["memorize"] / row["disk"],
        "object store over memorize": row["memorize"] / row["kept"],
    }


def _ready(llm: Any, keeper: Any, key: MemoryKey, slots: int, chance: random.Random) -> float:
    """Seconds until a question's first token, the keeper asked first as the Recaller does."""
    question = [chance.randrange(4096) for _ in range(QUESTION)]
    began = time.perf_counter()
    memory = ray.get(keeper.chunks.remote(key))
    answer = recalled(llm, [request(memory.key, slots, question, 1)])[0]
    assert len(answer) == 1, answer
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
