"""BM25 against its formula, and what counts as a word."""

import math

import numpy as np
import pytest

from retrieval_worker.bm25 import Bm25, words


def test_words_lose_case_and_endings_and_chinese_comes_in_pairs():
    assert list(words("The Keepers' gates, opened in 1487!")) == ["the", "keeper", "gate", "open", "in", "1487"]
    assert list(words("第三版3号门 open")) == ["第三", "三版", "3", "号门", "open"]
    assert list(words("城")) == ["城"] and not list(words("—!\n"))


def test_scores_are_lucenes_formula():
    texts = ["gate gate keeper", "keeper", "bread and wine and more bread", ""]
    scores = Bm25(texts).scores("Gates of bread, gates!")
    lengths, average = [3, 1, 6, 0], 10 / 4
    idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))  # both words are in one passage of four

    def part(count: int, length: int) -> float:
        return idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * length / average))

    # The query has `gate` twice.
    assert scores == pytest.approx([2 * part(2, lengths[0]), 0, part(2, lengths[2]), 0], rel=1e-5)


@pytest.mark.parametrize("texts", [[], [""], ["…", "!"]])
def test_passages_without_words(texts):
    assert np.array_equal(Bm25(texts).scores("gate"), np.zeros(len(texts)))
    assert Bm25(texts).measure_grounding("gate") == 0


def test_grounding_is_what_one_passage_holds_of_the_words():
    texts = ["the gate of the keeper", "the bread", "the wine", ""]
    bm25 = Bm25(texts)

    def idf(passages: int) -> float:
        return math.log(1 + (4 - passages + 0.5) / (passages + 0.5))

    assert bm25.measure_grounding("The keeper's gates, the gate!") == pytest.approx(
        (idf(3) + 2 * idf(1)) / (idf(3) + 2 * idf(1) + idf(0))  # the s of the genitive is a word that is nowhere
    )
    assert bm25.measure_grounding("keeper of the gate") == pytest.approx(1)
    assert bm25.measure_grounding("bread and wine") == pytest.approx(idf(1) / (2 * idf(1) + idf(0))), (
        "in two passages, not one"
    )
    assert bm25.measure_grounding("dragon") == 0 and bm25.measure_grounding("?!") == 0
    assert Bm25(["城门在三月打开。"]).measure_grounding("城门打开") == pytest.approx(
        2 * math.log(4 / 3) / (2 * math.log(4 / 3) + math.log(4))
    )


def test_a_chinese_question_finds_its_sentence():
    texts = ["旧港的灯塔建于光绪三年。", "第二年春天,海盗来袭。", "沈素梅成为第一位女守塔人。"]
    assert int(np.argmax(Bm25(texts).scores("谁是第一位女守塔人?"))) == 2
