"""Time to the first token of a question: memory injected, against prefilling the text itself, at four ratios.

The embedded model in float32; a generated text of `--tokens` tokens; vLLM in this process on one thread. Injected
cold: the memory is in the node's object store and nothing of it in the engine, so its keys are fetched, rotated and
written. Injected warm: its blocks are in the engine's prefix cache. The baseline is the same engine reading the text's
own tokens, nothing cached. Medians; the question is the same.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.support.recall_engine import IN_PROCESS

os.environ.update(IN_PROCESS)


from benchmarks.report import make_parser, report
from benchmarks.support.random_model import ensure_random_model
from benchmarks.support.recall_engine import connector_config, engine, group, ray_of_its_own, request, store_slots
from memory_worker.manifest import MemoryKey
from memory_worker.models.beacon import BeaconModel
from memory_worker.storage.store import MemoryStore

RATIOS = (2, 4, 8, 16)
HEAD, QUESTION, REPEATS = 32, 24, 5


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the text")
    arguments = parser.parse_args()
    chance = random.Random(0)
    text, head, question = ([chance.randrange(3, 4096) for _ in range(n)] for n in (arguments.tokens, HEAD, QUESTION))
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, ray_of_its_own():
        model = ensure_random_model(folder)
        beacon = BeaconModel.from_pretrained(model, device="cpu")
        store = MemoryStore(f"{folder}/store")
        kept_head = beacon.compress(head, ratio=2, head=HEAD)
        length = HEAD + arguments.tokens + QUESTION + 8
        options = {"max_model_len": length, "max_num_batched_tokens": max(length, 2048), "block_size": None}
        with engine(model, connector_config(store), **options) as llm:
            prefill = time_first_token(
                llm, lambda: ({"prompt_token_ids": head + text + question}, _one_token()), cold=True
            )
            for ratio in RATIOS:
                slots = beacon.compress(text, ratio=ratio, memory=kept_head)
                key = MemoryKey("bench", f"ratio-{ratio}", "v000001-00000000")
                parts = [(kept_head.keys, kept_head.values), (slots.keys, slots.values)]
                store_slots(store, key, parts)
                count = HEAD + len(slots)

                def ask(key: MemoryKey = key, count: int = count) -> tuple[Any, Any]:
                    return request(group(key, 1, count), [chance.randrange(4096) for _ in range(QUESTION)], 1)

                cold, warm = time_first_token(llm, ask, cold=True), time_first_token(llm, ask, cold=False)
                rows.append(
                    {
                        "ratio": ratio,
                        "slots": count,
                        "text tokens": arguments.tokens,
                        "prefill text (ms)": prefill * 1e3,
                        "injected cold (ms)": cold * 1e3,
                        "injected warm (ms)": warm * 1e3,
                        "cold speedup": prefill / cold,
                        "warm speedup": prefill / warm,
                    }
                )
                ratios[f"cold_ratio_{ratio}"] = prefill / cold
                ratios[f"warm_ratio_{ratio}"] = prefill / warm
    report("first token: memory injected against text prefilled", rows, ratios, arguments.json)


def time_first_token(llm: Any, ask: Callable[[], tuple[Any, Any]], cold: bool) -> float:
    """Median seconds from `generate` to its one token, after one run that does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        if cold:
            llm.reset_prefix_cache()
        prompt, params = ask()
        began = time.perf_counter()
        output = llm.generate([prompt], [params], use_tqdm=False)[0]
        seconds.append(time.perf_counter() - began)
        assert len(output.outputs[0].token_ids) == 1, output.outputs[0].finish_reason
    return median(seconds[1:])


def _one_token() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)


if __name__ == "__main__":
    main()
