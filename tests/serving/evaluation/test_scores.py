"""Metrics and recall against values worked out by hand."""

import pytest

from serving.evaluation.recall import Found, answer_recall, evidence_recall, rank_passages
from serving.evaluation.scores import exact, score
from tests.support.examples_of_questions import TEXT, example


@pytest.mark.parametrize(
    ("said", "right", "worth"),
    [
        ("In March.", ["in March"], 1.0),
        ("It opened in March [1].", ["in March"], 2 * (2 / 4) * 1 / (2 / 4 + 1)),  # of four words two are right
        ("April", ["in March"], 0.0),
        ("", ["in March"], 0.0),
        ("the keeper", ["A keeper!", "the gate"], 1.0),  # articles and punctuation do not count; the best answer does
    ],
)
def test_f1_is_squads(said, right, worth):
    assert score(example(answers=tuple(right)), said) == pytest.approx(worth)


def test_f1_of_chinese_counts_words():
    asked = example(language="zh", answers=("女守塔人沈素梅",))
    assert score(asked, "沈素梅") > 0.3 and score(asked, "女守塔人沈素梅。") == 1.0 and score(asked, "海盗") == 0.0


def test_exact():
    assert exact(example(), "In March!") == 1.0 and exact(example(), "March") == 0.0
    assert exact(example(language="zh", answers=("三月",)), "三月。") == 1.0


def test_rouge_l_is_the_longest_common_subsequence():
    asked = example(metric="rouge-l", answers=("police killed the gunman",))
    assert score(asked, "police kill the gunman") == pytest.approx(0.75)
    assert score(asked, "the gunman kill police") == pytest.approx(0.5)  # Lin, 2004
    assert score(example(metric="rouge-l", language="zh", answers=("灯塔很高",)), "灯塔很高") == 1.0


@pytest.mark.parametrize(
    ("said", "right", "worth"),
    [
        ("C", "C", 1), ("(C) because", "C", 1), ("The correct answer is (B), not A.", "B", 1), ("答案是C。", "C", 1),
        ("A, C", "AC", 1), ("AC", "A", 0), ("Because of D", "D", 1), ("none", "A", 0), ("", "A", 0),
        ("**Answer:** B", "B", 1), ("Answer: A dog", "A", 1), ("answer is b", "B", 0),
    ],
)  # fmt: skip
def test_choices(said, right, worth):
    assert score(example(metric="choice", answers=(right,)), said) == worth


def test_contains_and_class():
    asked = example(metric="contains", answers=("71432",))
    assert score(asked, "The key is 71432.") == 1.0 and score(asked, "714321") == 0.0
    classes = {"metric": "class", "classes": ("Food", "Person", "Invention"), "answers": ("Person",)}
    assert score(example(**classes), "Person\nFood") == 1.0 and score(example(**classes), "Food or Person") == 0.5
    assert score(example(**classes), "Persons?") == 1.0 and score(example(**classes), "nothing") == 0.0


def test_recall_of_evidence_is_the_share_of_spans_touched():
    asked = example(evidence=((0, 25), (26, 48)))
    found = [Found(49, 67, 0.1), Found(20, 30, 0.9), Found(0, 10, 0.5)]
    best_first = rank_passages(found)
    assert [p.start for p in best_first] == [20, 0, 49]
    assert evidence_recall(asked, best_first, 1) == 1.0, "it touches both"
    assert evidence_recall(asked, [Found(0, 10, 1.0)], 1) == 0.5 and evidence_recall(asked, [], 5) == 0.0
    assert evidence_recall(asked, [Found(25, 26, 1.0)], 1) == 0.0, "it begins where one ends"
    assert evidence_recall(example(), best_first, 1) is None


def test_recall_of_answers_asks_for_the_words():
    asked = example(answers=("two coins", "nowhere"))
    place = TEXT.index("Bread")
    assert answer_recall(asked, [Found(0, 25, 1.0), Found(place, place + 22, 0.5)], 1) == 0.0
    assert answer_recall(asked, [Found(0, 25, 1.0), Found(place, place + 22, 0.5)], 3) == 1.0
    assert answer_recall(example(answers=("nowhere",)), [], 1) is None
