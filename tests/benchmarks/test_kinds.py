"""The benchmark of kinds counts what a memory keeps: nothing behind the head alone, all behind the full memory."""

from pathlib import Path

import pytest

from benchmarks.kinds import measure
from serving.evaluation.datasets import Example

LINE = "The keeper of light {} wrote down nineteen ships and {} storms.\n"


def example(document: str, number: int) -> Example:
    text = "".join(LINE.format(n, n * n + len(document)) for n in range(12))
    start = text.index(f"The keeper of light {number} ")
    end = text.index("\n", start)
    answer = f"{number * number + len(document)} storms"
    question = f"What did the keeper of light {number} write down?"
    return Example(f"{document}-{number}", "", text, document, question, (answer,), "f1", "en", ((start, end),))


def test_shares_are_between_nothing_and_the_full_memory(random_model: Path) -> None:
    examples = [example(document, number) for document in ("one", "other") for number in (3, 5, 11)]
    cut = len(examples[0].text) - 10  # the last line's question has its evidence beyond
    rows = measure(random_model, examples, texts=2, questions=9, characters=cut, kinds=["pruned"])
    by = {(row["kind"], row["ratio"]): row for row in rows}
    assert {*by} == {("nothing", 0), ("full", 1), *(("pruned", ratio) for ratio in (2, 3, 4, 8, 16))}
    assert {row["questions"] for row in rows} == {4}
    for what in ("evidence", "answer"):
        assert by["nothing", 0][f"{what} kept"] == 0 and by["full", 1][f"{what} kept"] == 1
        assert by["nothing", 0][f"{what} log-loss"] != by["full", 1][f"{what} log-loss"]
    assert (
        by["full", 1]["bytes"] > by["pruned", 2]["bytes"] > by["pruned", 16]["bytes"] > by["nothing", 0]["bytes"] == 0
    )


def test_texts_without_evidence_are_said_to_be_none(random_model: Path) -> None:
    with pytest.raises(SystemExit, match="give more --characters"):
        measure(random_model, [example("one", 5)], texts=1, questions=1, characters=20)
