"""A corpus of millions of tokens as one memory: made once, asked in groups, its parts found again.

    python -m benchmarks.corpus [--tokens 5000000] [--texts FOLDER] [--json FILE]


One `embedded` server on this machine, at ratio 16. The documents are the `.txt` files of the folder, or generated
sentences, until there are so many tokens. Eight sentences that differ in a name and a place are put into eight of them;
`found` is the share of these that are among the three passages when they are asked for, with clues that are noise. A
passage has to be exactly what its document says. One document as a memory of its own is the baseline of the latencies.
"""

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
from transformers import AutoTokenizer

from benchmarks.report import make_parser, report, say
from serving.config import Profile, load_profile
from serving.deploy.app import resolve_models
from serving.deploy.temporary import measure_on_server

RATIO = 16
NEEDLES = 8
ANSWER_TOKENS = 16
LONGEST = 1000  # documents
_WORDS = ("harbour", "lantern", "orchard", "miller", "bridge", "winter", "ledger", "granary", "anchor", "chapel")
_NAMES = ("Quillon", "Ysolde", "Brannoc", "Tamsin", "Orlan", "Petra", "Corvin", "Maude")


def needle(number: int) -> tuple[str, str]:
    """A sentence and the question that it answers."""
    name = _NAMES[number]
    return (
        f"The copper astrolabe of {name} Farr was hidden under the step of the {_WORDS[number]} tower.",
        f"Where was the copper astrolabe of {name} Farr hidden?",
    )


def texts(folder: Path | None, chance: random.Random) -> Iterator[str]:
    if folder:
        yield from (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
    while not folder:
        yield " ".join(
            f"In the year {chance.randrange(900, 1800)} the {chance.choice(_WORDS)} by the {chance.choice(_WORDS)} "
            f"was given to the {chance.choice(_WORDS)}, and {chance.randrange(2, 99)} of them came."
            for _ in range(400)
        )


def corpus(folder: Path | None, tokens: int, tokenizer: Any) -> tuple[list[str], int]:
    """The documents, needles in them, and their tokens."""
    chance, documents, total = random.Random(0), [], 0
    for text in texts(folder, chance):
        documents.append(text)
        total += len(tokenizer.encode(text, add_special_tokens=False))
        if total >= tokens or len(documents) == LONGEST:
            break
    for number in range(NEEDLES):
        place = len(documents) * (2 * number + 1) // (2 * NEEDLES)
        half = documents[place].find(". ", len(documents[place]) // 2) + 2
        documents[place] = documents[place][:half] + needle(number)[0] + " " + documents[place][half:]
    return documents, total


def settings() -> Profile:
    profile = load_profile("embedded")
    memorize = profile.memory.memorize.model_copy(update={"ratio": RATIO})
    keeper = profile.memory.keeper.model_copy(update={"budget_bytes": 1 << 30})
    memory = profile.memory.model_copy(update={"memorize": memorize, "keeper": keeper})
    ray = profile.ray.model_copy(update={"object_store_bytes": 3 << 29})
    limits = profile.limits.model_copy(update={"body_bytes": 1 << 28})
    return profile.model_copy(update={"memory": memory, "ray": ray, "limits": limits})


async def make_memory(http: aiohttp.ClientSession, id: str, documents: list[str]) -> tuple[dict[str, Any], float]:
    """The memory, and the seconds until it was ready."""
    began = time.perf_counter()
    body = {"id": id, "documents": [{"id": f"d{i}", "text": text} for i, text in enumerate(documents)]}
    async with http.post("/v1/memories", json=body) as response:
        if response.status != 202:
            raise RuntimeError(await response.text())
    async with http.get(f"/v1/memories/{id}/events", timeout=aiohttp.ClientTimeout(None)) as events:
        async for line in events.content:
            if line.startswith(b"event: failed"):
                raise RuntimeError((await events.content.readline()).decode())
    async with http.get(f"/v1/memories/{id}") as response:
        return await response.json(), time.perf_counter() - began


async def ask_needles(
    http: aiohttp.ClientSession, id: str, documents: list[str], questions: list[tuple[str, str]]
) -> dict[str, Any]:
    """How many sentences were found again, and the median seconds of first and later questions."""
    found, seconds = 0, []
    for sentence, question in questions:
        began = time.perf_counter()
        body = {"question": question, "max_tokens": ANSWER_TOKENS}
        async with http.post(f"/v1/memories/{id}/answer", json=body) as response:
            answer = await response.json()
        seconds.append(time.perf_counter() - began)
        if answer.get("degraded") != ["embedded-model"]:
            raise RuntimeError(f"not a whole answer: {answer}")
        for passage in answer["passages"]:
            text = documents[int(passage["document"][1:])]
            if text[passage["start"] : passage["end"]] != passage["text"]:
                raise RuntimeError(f"{passage} is not what the document says")
        found += any(sentence in passage["text"] for passage in answer["passages"])
    return {
        "sentences found": f"{found} of {len(questions)}",
        "first question (s)": seconds[0],
        "question (s)": statistics.median(seconds[1:]),
    }


async def run(address: str, profile: Profile, documents: list[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    questions = [needle(number) for number in range(NEEDLES)]
    async with aiohttp.ClientSession(address, timeout=aiohttp.ClientTimeout(600)) as http:
        rows = []
        one = [documents[len(documents) // (2 * NEEDLES)]]
        for id, texts_, ask in [("one", one, questions[:1] * NEEDLES), ("corpus", documents, questions)]:
            say(f"memorizing {len(texts_)} documents")
            memory, seconds = await make_memory(http, id, texts_)
            groups = -(-memory["slots"] // profile.memory.group_slots)
            row = {
                "documents": len(texts_),
                "tokens": memory["tokens"],
                "slots": memory["slots"],
                "at least groups": groups,
                "passages": memory["passages"],
                "made in (s)": seconds,
            }
            rows.append(row | await ask_needles(http, id, texts_, ask))
    small, large = rows
    ratios = {
        "tokens_over_one_document": large["tokens"] / small["tokens"],
        "question_over_one_document": large["question (s)"] / small["question (s)"],
        "found": int(large["sentences found"].split()[0]) / NEEDLES,
    }
    return rows, ratios


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--texts", type=Path, help="folder of .txt files; none generates texts")
    arguments = parser.parse_args()
    profile = settings()
    tokenizer = AutoTokenizer.from_pretrained(resolve_models(profile).memory.engine.model)
    documents, tokens = corpus(arguments.texts, arguments.tokens, tokenizer)
    say(f"{len(documents)} documents of {tokens:,} tokens; starting a server")
    rows, ratios = measure_on_server(profile, lambda address, _: run(address, profile, documents))
    report("corpus", rows, ratios, arguments.json)


if __name__ == "__main__":
    main()
