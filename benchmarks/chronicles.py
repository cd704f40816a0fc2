"""What the embedded model can do on chronicles it has not seen: clues, answers and recall, with and without memory.

    python -m benchmarks.chronicles [--seed N] [--json FILE] [--chronicles 3] [--facts 150] [--questions 48]

Chronicles of `examples/chronicles.py` from the seed, of the split `test`: held-out names and held-out wordings among
the others. Each is memorized at every ratio by a server of the profile, and the same questions, of all kinds in equal
shares as far as there are, are asked with the tasks `memorag`, `rag` and `memory`. The first ratio gives the figures:

    answer_exact_match       the answer, word for word but for case, articles and citations, from passages
    clue_contains_span       one of the clues holds the sentence that the answer stands in, whole
    recall_at_3              that sentence is in one of the 3 passages: of `memorag`, and of `rag`
    two_step_recall_at_3     the same of questions that share no content word with that sentence
    memory_exact_match       the answer from memory alone
    emptied_memory_exact_match   the same questions with the memory of a text that tells nothing: chance

Every answer's `degraded` says `embedded-model`: these chronicles are what that model knows.
"""

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.report import make_parser, report, say
from examples.chronicles import KINDS, document
from serving.client.client import Answer, MemoRAG, Memory
from serving.config import load_profile
from serving.deploy.temporary import measure_on_server
from serving.evaluation.datasets import Example
from serving.evaluation.recall import Found, evidence_recall, rank_passages
from serving.evaluation.scores import exact

RATIOS = (4, 2, 8)
AT_ONCE = 8
ANSWER_TOKENS = 32
EMPTY = "There is nothing to tell. "  # and what a memory of it can be asked, it cannot know
Question = dict[str, Any]
Values = dict[str, list[float]]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=2026, help="of the first chronicle; the others follow")
    parser.add_argument("--chronicles", type=int, default=3)
    parser.add_argument("--facts", type=int, default=150, help="of each chronicle; 150 are about 2,000 words")
    parser.add_argument("--questions", type=int, default=48, help="on each chronicle")
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS, help="the first gives the figures")
    parser.add_argument("--profile", default="embedded")
    arguments = parser.parse_args()
    documents = [document(arguments.seed + number, arguments.facts, "test") for number in range(arguments.chronicles)]
    asked = [choose_questions(each["questions"], arguments.questions, arguments.seed) for each in documents]
    say("starting a server")
    rows = measure_on_server(
        load_profile(arguments.profile),
        lambda address, _: asyncio.to_thread(_rows, address, documents, asked, arguments.ratios),
    )
    figures = figures_of(rows[0])
    report("chronicles", rows, flat(figures), arguments.json)
    if arguments.json:
        whole = json.loads(arguments.json.read_text(encoding="utf-8"))
        arguments.json.write_text(json.dumps(whole | figures, indent=1) + "\n", encoding="utf-8")


def choose_questions(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """At most `count` of them, of every kind about as many."""
    draw = random.Random(seed)
    kinds = [
        draw.sample(of_kind, len(of_kind)) for of_kind in ([q for q in questions if q["kind"] == k] for k in KINDS)
    ]
    taken: list[Question] = []
    while len(taken) < count and any(kinds):
        taken += [of_kind.pop() for of_kind in kinds if of_kind]
    return taken[:count]


def _rows(
    address: str, documents: Sequence[dict[str, Any]], asked: Sequence[list[Question]], ratios: Sequence[int]
) -> list[dict[str, Any]]:
    rows = []
    with MemoRAG(address, timeout=600) as client, ThreadPoolExecutor(AT_ONCE) as threads:
        for ratio in ratios:
            values: Values = defaultdict(list)
            empty = client.memorize(text=EMPTY * 40, id=f"empty-{ratio}", ratio=ratio, progress=False)
            for number, (each, questions) in enumerate(zip(documents, asked, strict=True), 1):
                say(f"ratio {ratio}, chronicle {number} of {len(documents)}, {len(each['text']):,} characters")
                memory = client.memorize(
                    text=each["text"], id=f"chronicle-{number}-{ratio}", ratio=ratio, progress=False
                )

                measure = partial(_measure, memory, empty, each["text"])
                for found in threads.map(measure, questions):
                    for name, value in found.items():
                        values[name] += value
            rows.append({"ratio": ratio, "questions": sum(map(len, asked))} | {n: fmean(v) for n, v in values.items()})
    return rows


def _measure(memory: Memory, empty: Memory, text: str, question: Question) -> Values:
    return dict(_figures(memory, empty, text, question))


def _figures(memory: Memory, empty: Memory, text: str, question: Question) -> Iterator[tuple[str, list[float]]]:
    example = Example(
        id="", task="", text=text, document="", question=question["question"], answers=tuple(question["answers"]),
        metric="f1", evidence=tuple((start, end) for start, end in question["evidence"]),
    )  # fmt: skip
    answers = {task: _ask(memory, example, task) for task in ("memorag", "rag", "memory")}
    clues = [_plain(clue["text"]) for clue in answers["memorag"].clues]
    spans = [_plain(text[start:end]) for start, end in example.evidence]
    yield "clue_contains_span", [float(all(any(span in clue for clue in clues) for span in spans))]
    for task in ("memorag", "rag"):
        yield f"answer_exact_match_{task}", [exact(example, answers[task].text)]
        passages = rank_passages([Found(p["start"], p["end"], p["score"]) for p in answers[task].passages])
        recall = evidence_recall(example, passages, 3)
        assert recall is not None, question
        yield f"recall_at_3_{task}", [recall]
        yield f"two_step_recall_at_3_{task}", [recall] if question["kind"] == "two-step" else []
    yield "memory_exact_match", [exact(example, answers["memory"].text)]
    yield "emptied_memory_exact_match", [exact(example, _ask(empty, example, "memory").text)]


def _ask(memory: Memory, example: Example, task: Any) -> Answer:
    answer: Answer = memory.ask(example.question, task, max_tokens=ANSWER_TOKENS)
    if lacking := set(answer.degraded) - {"embedded-model"}:
        raise RuntimeError(f"not a whole answer: {lacking}")
    return answer


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def figures_of(row: dict[str, Any]) -> dict[str, Any]:
    """The figures that bars are set for, under their names; those of both tasks by task."""
    return {
        "answer_exact_match": row["answer_exact_match_memorag"],
        "clue_contains_span": row["clue_contains_span"],
        **{
            name: {task: row[f"{name}_{task}"] for task in ("memorag", "rag")}
            for name in ("recall_at_3", "two_step_recall_at_3")
        },
        "emptied_memory_exact_match": row["emptied_memory_exact_match"],
    }


def flat(figures: dict[str, Any]) -> dict[str, float]:
    """Figures by one name each, and what memory adds to recall."""
    out: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            out |= {f"{name}.{task}": each for task, each in value.items()}
            out[f"{name}, gained"] = value["memorag"] - value["rag"]
        else:
            out[name] = value
    return out


if __name__ == "__main__":
    main()
