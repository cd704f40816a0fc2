"""Intervals: what must hold of any bootstrap, and that questions on one text are drawn together."""

import numpy as np
import pytest

from serving.evaluation.bootstrap import difference, interval

CHANCE = np.random.default_rng(7)
VALUES = CHANCE.random(300).tolist()
EACH_ITS_OWN = [str(n) for n in range(300)]


def test_it_is_the_mean_with_some_two_standard_errors_on_each_side():
    found = interval(VALUES, EACH_ITS_OWN)
    error = np.std(VALUES) / np.sqrt(300)
    assert found.mean == pytest.approx(np.mean(VALUES)) and found.count == 300
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.2 * error)


def test_the_same_values_give_the_same_interval():
    assert interval(VALUES, EACH_ITS_OWN) == interval(VALUES, EACH_ITS_OWN)


def test_pairing_sees_a_difference_that_is_small_but_always_there():
    better = [value + 0.01 for value in VALUES]
    found = difference(better, VALUES, EACH_ITS_OWN)
    assert found.mean == pytest.approx(0.01) and found.low > 0.009
    assert difference(VALUES, VALUES, EACH_ITS_OWN).low == 0.0 == difference(VALUES, VALUES, EACH_ITS_OWN).high


def test_questions_on_one_text_are_not_counted_as_if_each_were_news():
    documents = [str(n // 30) for n in range(300)]
    values = [(n // 30) % 2 + 0.0 for n in range(300)]  # all questions on one text are alike
    together, apart = interval(values, documents), interval(values, EACH_ITS_OWN)
    assert together.mean == apart.mean == 0.5
    assert together.high - together.low > 3 * (apart.high - apart.low)


def test_one_document_cannot_tell():
    found = interval([0.0, 1.0], ["a", "a"])
    assert (found.mean, found.low, found.high, found.count) == (0.5, None, None, 2)
