"""A batch run against the same questions over HTTP from 16 clients, and against itself with grouping switched off.

    python -m benchmarks.batch [--json FILE] [--questions 384] [--memories 96] [--tokens 32768]

One `embedded` server on this machine. All memories are archives of one text at ratio 2, so that together they have more
slots than the Recaller's engine (524,288) and its node's keeper hold: when a memory is asked decides what is loaded.
The questions are shuffled over the memories; HTTP clients, and the run without grouping, ask them in that order. 16
questions are in flight in each way. Each way asks a memory other questions, so that none profits from another's cache.

A run has a fixed cost before its first question: processes that read and sort. It is in `seconds` and not in `asking`,
of which the ratios are: over 10,000 questions it would hardly count. The load average is the machine's at the end of
each way, with all that ran on it: where it is far above the number of cores, this benchmark was not alone.
"""

import argparse
import asyncio
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow as pa

from benchmarks.report import make_parser, report, say
from examples.chronicles import document
from serving.batch.answer import answer_all
from serving.batch.progress import OnCount, counting
from serving.client.client import MemoRAG
from serving.config import load_profile
from serving.deploy.temporary import measure_on_server

CLIENTS = 16
WAYS = ("HTTP, 16 clients", "batch, not grouped", "batch")
ANSWER_TOKENS = 8
RATIO = 2
CHRONICLE = document(7, 150, "test")  # what the embedded model can be asked


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--questions", type=int, default=384, help="asked in each way")
    parser.add_argument("--memories", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of each memory's text, about")
    arguments = parser.parse_args()
    say("starting a server")
    http, ungrouped, grouped = measure_on_server(
        load_profile("embedded"), lambda address, storage: asyncio.to_thread(_rows, arguments, address, Path(storage))
    )
    ratios = {
        "over_http": http["asking (s)"] / grouped["asking (s)"],
        "over_ungrouped": ungrouped["asking (s)"] / grouped["asking (s)"],
        "whole_call_over_http": http["seconds"] / grouped["seconds"],
        "whole_call_over_ungrouped": ungrouped["seconds"] / grouped["seconds"],
    }
    report("batch", [http, ungrouped, grouped], ratios, arguments.json)


def _rows(arguments: argparse.Namespace, address: str, folder: Path) -> list[dict[str, Any]]:
    slots = _memorize(address, arguments.memories, arguments.tokens, folder)
    return [_row(way, arguments, slots, address, folder) for way in WAYS]


def _row(way: str, arguments: argparse.Namespace, slots: int, address: str, folder: Path) -> dict[str, Any]:
    table = _questions(arguments.questions, arguments.memories, way)
    say(way)
    began = time.perf_counter()
    asking = None
    if way == WAYS[0]:
        asyncio.run(_over_http(address, table.to_pylist()))
    else:
        grouped = way == "batch"
        done = answer_all(table, folder / way, concurrency=CLIENTS, group_by_memory=grouped, progress=True)
        if done.answered != arguments.questions:
            raise RuntimeError(f"not all were answered: {done}")
        asking = done.seconds
    seconds = time.perf_counter() - began
    rate = arguments.questions / (asking or seconds)
    say(f"{way} took {seconds:.0f} s, {rate:.2f} questions/s; next")
    return {
        "way": way,
        "questions": arguments.questions,
        "memories": arguments.memories,
        "slots of one": slots,
        "seconds": seconds,
        "asking (s)": asking or seconds,
        "questions/s": rate,
        "load average": os.getloadavg()[0],
    }


def _memorize(address: str, count: int, tokens: int, folder: Path) -> int:
    """Makes one memory, and the others of its archive; returns its slots."""
    text = CHRONICLE["text"] + "\n"
    with MemoRAG(address) as client:
        say("memorizing one text")
        client.memorize(text=text[:4000], id="probe", ratio=RATIO, progress=False)
        per_character = client.memory("probe").info["tokens"] / 4000
        characters = int(tokens / per_character)
        text = (text * (characters // len(text) + 1))[:characters]
        first = client.memorize(text=text, id="memory-0", ratio=RATIO, progress=False)
        archive = folder / "memory.tar"
        first.export(archive)
        say(f"importing it {count - 1} times")
        for n in range(1, count):
            client.import_archive(archive, f"memory-{n}")
        return int(first.info["slots"])


def _questions(count: int, memories: int, way: str) -> pa.Table:
    """Each memory is asked one question of the chronicle after another, in each way others."""
    order = [n % memories for n in range(count)]
    random.Random(0).shuffle(order)
    asked = [question["question"] for question in CHRONICLE["questions"]]
    first = WAYS.index(way) * len(asked) // len(WAYS)
    rows = []
    next_of: defaultdict[int, int] = defaultdict(lambda: first)
    for n, memory in enumerate(order):
        question = asked[next_of[memory] % len(asked)]
        next_of[memory] += 1
        row = {"id": f"q{n:06d}", "memory": f"memory-{memory}", "question": question, "max_tokens": ANSWER_TOKENS}
        rows.append(row)
    return pa.Table.from_pylist(rows)


async def _over_http(address: str, questions: list[dict[str, Any]]) -> None:
    waiting = list(reversed(questions))
    answered = 0

    async def client(http: aiohttp.ClientSession, count: OnCount) -> None:
        nonlocal answered
        while waiting:
            row = waiting.pop()
            body = {"question": row["question"], "max_tokens": row["max_tokens"]}
            async with http.post(f"/v1/memories/{row['memory']}/answer", json=body) as response:
                response.raise_for_status()
                await response.read()
            answered += 1
            count(answered, len(questions), 0)

    timeout = aiohttp.ClientTimeout(total=600)
    with counting("asking", "questions", True) as count:
        async with aiohttp.ClientSession(address, timeout=timeout) as http, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client(http, count))


if __name__ == "__main__":
    main()
