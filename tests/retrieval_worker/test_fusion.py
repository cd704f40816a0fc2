"""Fusion and fitting, on values worked out by hand."""

import pytest

from retrieval_worker.fusion import fit, fuse
from retrieval_worker.messages import Hit, Passage


def hit(id: int, tokens: int = 10) -> Hit:
    return Hit(Passage(id, "m", "d", id, id + 1, "x", tokens), 0.5)


def ids(hits):
    return [each.passage.id for each in hits]


def test_scores_are_sums_of_reciprocal_ranks():
    fused = fuse([[hit(1), hit(2)], [hit(2), hit(3)]], k=60)
    assert ids(fused) == [2, 1, 3]
    assert [each.score for each in fused] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_ties_go_to_the_questions_ranking_then_document_order():
    assert ids(fuse([[hit(9)], [hit(1)], [hit(0)]], k=60)) == [9, 1, 0]
    assert ids(fuse([[hit(9), hit(1)], [hit(1), hit(9)]], k=60)) == [1, 9]


def test_a_passage_counts_once_per_ranking():
    assert [each.score for each in fuse([[hit(1), hit(1), hit(2)]], k=1)] == pytest.approx([1 / 2, 1 / 3])


def test_nothing_to_fuse():
    assert fuse([], k=60) == [] and fuse([[], []], k=60) == [] and fit([], 5, 100) == []


def test_fit_takes_the_best_that_fit_and_restores_document_order():
    hits = [hit(7, 50), hit(3, 60), hit(5, 40), hit(1, 10)]
    assert ids(fit(hits, 5, 95)) == [5, 7]
    assert ids(fit(hits, 5, 100)) == [1, 5, 7]
    assert ids(fit(hits, 2, 1000)) == [3, 7]
    assert fit(hits, 0, 1000) == [] and fit(hits, 5, 5) == []
