import random

import pytest

from memory_worker.recall.clues import ClueLines

TEXT = """1. The gate is opened twice.
2) The Gate is opened twice.
- "He rose at dawn."

(3) 3.5 million people
* ok
一、林黛玉进贾府。
Q4: Who opened it?
1812 was the year
I. Newton wrote it
• 门
“Yes,” she said, “no.”
the last line"""

CLUES = [
    "The gate is opened twice.",
    "He rose at dawn.",
    "3.5 million people",
    "林黛玉进贾府。",
    "Who opened it?",
    "1812 was the year",
    "I. Newton wrote it",
    "“Yes,” she said, “no.”",
    "the last line",
]


def test_lines_become_clues() -> None:
    lines = ClueLines(100)
    assert lines.feed(TEXT) == CLUES[:-1]
    assert lines.close() == CLUES[-1:]
    assert lines.close() == []


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_size_give_the_same_clues(seed: int) -> None:
    chance, lines, found, rest = random.Random(seed), ClueLines(100), [], TEXT
    while rest:
        size = chance.randint(1, 9)
        piece, rest = rest[:size], rest[size:]
        found += lines.feed(piece)
    assert found + lines.close() == CLUES


def test_a_clue_comes_with_its_new_line_and_not_before() -> None:
    lines = ClueLines(8)
    assert lines.feed("The gate is open") == []
    assert lines.feed("ed twice.\nAnd") == ["The gate is opened twice."]


def test_no_more_than_asked_for() -> None:
    lines = ClueLines(2)
    assert lines.feed("first\nsecond\nthird\n") == ["first", "second"]
    assert lines.full
    assert lines.feed("fourth\n") + lines.close() == []


def test_nothing_worth_searching() -> None:
    lines = ClueLines(8)
    assert lines.feed("\n  \n...\n- \n1.\n**\n\ufffd\n") + lines.close() == []
