"""Passages and sentences are exact slices of their text, whatever the text."""

import random
import time

import pytest

from retrieval_worker.evidence import detect_language, split_sentences
from retrieval_worker.passages import cut

ENGLISH = "Mr. Darcy bowed. “Are you sure?” said she.\n\nThe gate was opened at 9.30 p.m.; nobody came!\n"
CHINESE = "你好。他说：“天气好吗？”然后走了！\n第二段，没有人来。"
EMOJI = "👨‍👩‍👧 e\u0301te\u0301 \U0001f1e8\U0001f1f3. z\u0335a\u0328lgo! "
PIECES = [
    ENGLISH,
    CHINESE,
    EMOJI,
    "line\r\nline\r\n\r\n",
    "x" * 3000,
    "天" * 900,
    " \u3000\n\t",
    "\ufeffno break\u00a0",
    "",
]


def random_texts() -> list[str]:
    chance = random.Random(7)
    return ["".join(chance.choices(PIECES, k=chance.randint(1, 30))) for _ in range(60)]


@pytest.mark.parametrize("size,overlap", [(800, 0), (40, 0), (200, 60), (1, 0)])
def test_slices_are_exact_ordered_and_lose_nothing(size, overlap):
    for text in random_texts()[: 10 if size == 1 else 60]:
        slices = cut(text, size, overlap)
        covered = 0
        for (start, end), following in zip(slices, [*slices[1:], (len(text), 0)], strict=True):
            piece = text[start:end]
            assert 0 < end - start <= size
            assert piece == piece.strip()
            assert not text[covered:start].strip(), "text between passages is lost"
            assert start < following[0] or following[0] == len(text)
            covered = max(covered, end)
        assert not text[covered:].strip()


@pytest.mark.parametrize("text", ["", " ", "\n\r\n\t", "\u3000\u00a0"])
def test_white_space_has_no_passages(text):
    assert cut(text, 800) == []
    assert split_sentences(text) == []


@pytest.mark.parametrize("text", ["x" * 700_000, "天" * 300_000, "word " * 140_000])
def test_cutting_takes_linear_time(text):
    began = time.process_time()
    assert cut(text, 800)
    assert time.process_time() - began < 5


def test_paragraphs_stay_whole_where_they_fit():
    text = "One paragraph here.\n\nAnother paragraph there.\n\n" * 3
    assert [text[a:b] for a, b in cut(text, 30)] == ["One paragraph here.", "Another paragraph there."] * 3


def test_sentences_are_exact_slices():
    for text in [*random_texts(), ENGLISH, CHINESE]:
        covered = 0
        for start, end in split_sentences(text):
            assert start >= covered and text[start:end] == text[start:end].strip() != ""
            assert not any(c.isalnum() for c in text[covered:start])
            covered = end
        assert not any(c.isalnum() for c in text[covered:])


def test_sentences_of_both_languages():
    def read(text):
        return [text[a:b] for a, b in split_sentences(text)]

    assert read("Mr. Darcy bowed.  “Are you sure?”\n\nNobody came!") == [
        "Mr. Darcy bowed.",
        "“Are you sure?”",
        "Nobody came!",
    ]
    assert read("你好。我很好！然后走了。") == ["你好。", "我很好！", "然后走了。"]
    assert (detect_language("They met Wang 王 at noon"), detect_language("他在 Paris 住了三年")) == ("en", "zh")
