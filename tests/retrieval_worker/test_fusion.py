"""Fusion and fitting, on values worked out by hand."""

import pytest

from retrieval_worker.config import SearchConfig
from retrieval_worker.fusion import clue_weights, fit, fuse, select_hits
from retrieval_worker.messages import Hit, Passage, Ranking


def hit(id: int, tokens: int = 10) -> Hit:
    return Hit(Passage(id, "m", "d", id, id + 1, "x", tokens), 0.5)


def ids(hits):
    return [each.passage.id for each in hits]


def fused(*rankings, k, weights=None):
    return fuse([Ranking(tuple(hits), 1.0) for hits in rankings], weights or [1.0] * len(rankings), k)


def test_scores_are_sums_of_reciprocal_ranks():
    best = fused([hit(1), hit(2)], [hit(2), hit(3)], k=60)
    assert ids(best) == [2, 1, 3]
    assert [each.score for each in best] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_ties_go_to_the_questions_ranking_then_document_order():
    assert ids(fused([hit(9)], [hit(1)], [hit(0)], k=60)) == [9, 1, 0]
    assert ids(fused([hit(9), hit(1)], [hit(1), hit(9)], k=60)) == [1, 9]


def test_a_passage_counts_once_per_ranking():
    assert [each.score for each in fused([hit(1), hit(1), hit(2)], k=1)] == pytest.approx([1 / 2, 1 / 3])


def test_nothing_to_fuse():
    assert fused(k=60) == [] and fused([], [], k=60) == [] and fit([], 5, 100) == []


def test_a_ranking_counts_by_its_weight():
    best = fused([hit(1), hit(2)], [hit(3), hit(2)], k=2, weights=[1.0, 0.25])
    assert ids(best) == [1, 2, 3]
    assert [each.score for each in best] == pytest.approx([1 / 3, 1.25 / 4, 0.25 / 3])
    assert ids(fused([hit(1)], [hit(0)], k=2, weights=[1.0, 0.0])) == [1, 0], "what weighs nothing comes last"
    with pytest.raises(ValueError):
        fused([hit(1)], [hit(0)], k=2, weights=[1.0])


def test_clues_that_no_passage_says_do_not_outvote_the_question():
    question, right = Ranking((hit(1), hit(2)), 0.6), Ranking((hit(2), hit(1)), 1.0)
    made_up = [Ranking((hit(7), hit(8)), 0.15)] * 4

    def best(*clues, weights=None):
        rankings = [question, *clues]
        return ids(fuse(rankings, weights or clue_weights(rankings, question.grounding), 2))[:2]

    assert clue_weights([question, right, *made_up], 0.6) == pytest.approx([1, 1] + [1 / 16] * 4)
    assert best(*made_up) == [1, 2] and best(*made_up, weights=[1.0] * 5) == [7, 8]
    assert best(*made_up, right, right) == [2, 1]


def test_where_even_the_question_shares_no_word_all_clues_count():
    rankings = [Ranking((hit(1),), 0.0), Ranking((hit(2),), 0.3), Ranking((hit(3),), 0.0)]
    assert clue_weights(rankings, 0.0) == [1, 1, 1]


def test_the_questions_best_passage_is_kept_whatever_clues_find():
    rankings = [Ranking((hit(9), hit(1)), 0.5), *[Ranking((hit(3), hit(4), hit(1)), 1.0)] * 4]
    search = SearchConfig(passages=2)
    assert ids(select_hits(rankings, [1.0] * 5, search)) == [3, 9] and ids(
        select_hits(rankings[:1], [1.0], search)
    ) == [1, 9]
    assert select_hits([], [], search) == [] and select_hits([Ranking((), 0.0)], [1.0], search) == []


def test_fit_takes_the_best_that_fit_and_restores_document_order():
    hits = [hit(7, 50), hit(3, 60), hit(5, 40), hit(1, 10)]
    assert ids(fit(hits, 5, 95)) == [5, 7]
    assert ids(fit(hits, 5, 100)) == [1, 5, 7]
    assert ids(fit(hits, 2, 1000)) == [3, 7]
    assert fit(hits, 0, 1000) == [] and fit(hits, 5, 5) == []
