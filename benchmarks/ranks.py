"""Memorizing on two ranks of one thread each, against one rank of one thread; bytes exchanged against the formula.

The model is that of `benchmarks.memorize` (random weights, 4 layers, hidden 256, window 512), in float32, at ratios 32
and 8, with as many windows a pass on each rank as one rank alone takes. Ranks are processes of their own on this
machine, with gloo between them. They memorize the same text, cut into segments of 48 windows; one rank alone and two
ranks take turns, `ROUNDS` times, and the least disturbed of each counts. One thread a rank makes the comparison one
of ranks: on a machine with a core for each, two ranks can at best be twice as fast. CPU seconds are those of the
busiest rank, all its threads: what it would take if nothing else ran and nobody were waited for.

Bytes are those one rank sends: `predicted` from `count_exchanged_bytes`, `counted` at the all-gather, `written` what
the kernel says that the process wrote meanwhile, which has gloo's own messages in it. `difference` is the largest
between any number that one rank and two ranks made.

What the first rank does alone is measured beside it, by CPU second: reading a text into tokens with the embedded
tokenizer, and writing slots as segment files (digest included, waiting for the disk not). Those bound many ranks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.memorize import HEAD_DIM, KV_HEADS, LAYERS, VOCABULARY, WINDOW, write_model
from benchmarks.report import make_parser, report, say
from benchmarks.support.town import EXAMPLE

RATIOS = (32, 8)
WINDOWS, SEGMENT_WINDOWS, GROUP_WINDOWS = 96, 48, 4
ROUNDS = 3
HOST, TIMEOUT_S = "127.0.0.1", 300.0


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--case", nargs=5, metavar=("FOLDER", "RATIO", "RANK", "RANKS", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        folder, *numbers = arguments.case
        print(json.dumps(_measure(Path(folder), *map(int, numbers))), flush=True)
        return
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for ratio in RATIOS:
            runs: dict[int, list[list[dict[str, Any]]]] = {1: [], 2: []}
            for number in range(ROUNDS):
                for ranks, done in runs.items():
                    say(f"ratio {ratio}, round {number + 1} of {ROUNDS}: {ranks} ranks")
                    done.append(_measure_apart(folder, ratio, ranks))
            best = {ranks: min(done, key=lambda run: run[0]["seconds"]) for ranks, done in runs.items()}
            predicted = _predict_bytes(ratio)
            for ranks, run in best.items():
                rows.append(
                    {
                        "ratio": ratio,
                        "ranks": ranks,
                        "tokens": WINDOWS * WINDOW,
                        "seconds": run[0]["seconds"],
                        "CPU seconds": _busiest(run),
                        "tokens/s": WINDOWS * WINDOW / run[0]["seconds"],
                        "predicted (bytes)": predicted if ranks == 2 else 0,
                        "counted (bytes)": run[0]["counted"],
                        "written (bytes)": run[0]["written"],
                    }
                )
            ratios[f"two_ranks_over_one_ratio_{ratio}"] = best[1][0]["seconds"] / best[2][0]["seconds"]
            ratios[f"cpu_of_one_over_busiest_of_two_ratio_{ratio}"] = _busiest(best[1]) / _busiest(best[2])
            ratios[f"counted_over_predicted_ratio_{ratio}"] = best[2][0]["counted"] / predicted
            ratios[f"written_over_predicted_ratio_{ratio}"] = best[2][0]["written"] / predicted
            ratios[f"difference_ratio_{ratio}"] = _difference(Path(folder))
        say("reading and writing, by the first rank alone")
        ratios |= _measure_alone(Path(folder))
    report("ranks", rows, ratios, arguments.json)


def _busiest(run: list[dict[str, Any]]) -> float:
    return max(rank["cpu"] for rank in run)


def _predict_bytes(ratio: int) -> int:
    from memory_worker.models.beacon.exchange import count_exchanged_bytes

    passes = WINDOWS // (2 * GROUP_WINDOWS)
    slot_bytes = 2 * KV_HEADS * HEAD_DIM * 4
    return count_exchanged_bytes(
        [GROUP_WINDOWS * WINDOW // ratio] * passes, ranks=2, layers=LAYERS, slot_bytes=slot_bytes
    )


def _difference(folder: Path) -> float:
    from safetensors.torch import load_file

    alone, together = (load_file(folder / f"slots-{ranks}.safetensors") for ranks in (1, 2))
    return max(float((alone[name] - together[name]).abs().max()) for name in alone)


def _measure_alone(folder: Path) -> dict[str, float]:
    """Rates, by CPU second, of what is not spread over ranks."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.support.random_model import ensure_random_model
    from memory_worker.manifest import MemoryShape
    from memory_worker.storage.store import MemoryStore, segment_path

    tokenizer = AutoTokenizer.from_pretrained(ensure_random_model(folder / "embedded"))
    text = EXAMPLE.read_text(encoding="utf-8")
    text *= 4_000_000 // len(text)
    start = time.process_time()
    pieces = (text[at : at + 100_000] for at in range(0, len(text), 100_000))
    tokens = sum(len(tokenizer.encode(piece, add_special_tokens=False)) for piece in pieces)
    reading = time.process_time() - start
    store = MemoryStore(str(folder / "storage"))
    key = store.new_version("bench", "book")
    shape = MemoryShape(layers=28, kv_heads=4, head_dim=128, dtype="bfloat16")
    keys = torch.randn(28, 4, 4096, 128).to(torch.bfloat16)
    start = time.process_time()
    store.write_segment(segment_path(key, "text", 0, 0), shape, [(keys, keys)])
    writing = time.process_time() - start
    return {
        "characters_read_per_cpu_s": len(text) / reading,
        "tokens_read_per_cpu_s": tokens / reading,
        "slot_megabytes_written_per_cpu_s": 2 * keys.numel() * 2 / writing / 1e6,
    }


def _measure_apart(folder: str, ratio: int, ranks: int) -> list[dict[str, Any]]:
    """`_measure` in a process for each rank."""

    def start(rank: int, port: int) -> "subprocess.Popen[str]":
        numbers = map(str, (ratio, rank, ranks, port))
        command = [sys.executable, "-m", "benchmarks.ranks", "--case", folder, *numbers]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first = start(0, 0)
    port = int(_output(first).readline()) if ranks > 1 else 0
    processes = [first, *(start(rank, port) for rank in range(1, ranks))]
    results = [json.loads(_output(process).read()) for process in processes]
    if any(process.wait() for process in processes):
        raise RuntimeError("a rank failed: its messages are above")
    return results


def _output(process: "subprocess.Popen[str]") -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def _measure(folder: Path, ratio: int, rank: int, ranks: int, port: int) -> dict[str, Any]:
    """One rank, in this process: seconds of the text, and bytes sent."""
    import torch
    from safetensors.torch import save_file

    from memory_worker.models.beacon import BeaconModel, Exchange, Slots
    from memory_worker.models.beacon.exchange import reach_store, serve_store

    torch.set_num_threads(1)
    model = BeaconModel.from_pretrained(folder)
    exchange: Exchange | None = None
    if ranks > 1:
        if rank == 0:
            store, port = serve_store(HOST, ranks, TIMEOUT_S)
            print(port, flush=True)
        else:
            store = reach_store(HOST, port, ranks, TIMEOUT_S)
        exchange = Exchange(store, rank, ranks, host=HOST, device=model.device, timeout_s=TIMEOUT_S)
    text = torch.randint(0, VOCABULARY, (WINDOWS * WINDOW,), generator=torch.Generator().manual_seed(1))

    def memorize(tokens: torch.Tensor) -> Slots:
        segments = [*tokens.split(SEGMENT_WINDOWS * WINDOW)]
        passes = model.compress_documents(segments, ratio=ratio, group_windows=GROUP_WINDOWS * ranks, exchange=exchange)
        return Slots.concat([part.slots for parts in passes for part in parts])

    memorize(text[: 4 * GROUP_WINDOWS * WINDOW])  # warm, and all ranks begin together
    counted, written = (exchange.bytes_sent, _count_written()) if exchange else (0, 0)
    start, spent = time.perf_counter(), time.process_time()
    slots = memorize(text)
    seconds, cpu, sent = time.perf_counter() - start, time.process_time() - spent, _count_written() - written
    if rank == 0:
        save_file({"keys": slots.keys, "values": slots.values}, folder / f"slots-{ranks}.safetensors")
    return {
        "seconds": seconds,
        "cpu": cpu,
        "counted": exchange.bytes_sent - counted if exchange else 0,
        "written": sent if exchange else 0,
    }


def _count_written() -> int:
    """Bytes this process has written by system calls, to sockets too."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


if __name__ == "__main__":
    main()
