"""Over memories whose heads share their slots, vLLM says token for token what transformers does with the same pairs
masked: many at once, after eviction and under preemption."""

from typing import Any

import pytest

from tests.support.scenarios import run_scenario

QUESTIONS = 16


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_scenario("head_scenarios", tmp_path_factory.mktemp("heads"))


def test_the_memories_tell_a_mistake(seen) -> None:
    assert seen["different"] == QUESTIONS
    assert seen["spread"] > 2, "a head has more than twice its share"


def test_questions_to_four_memories_at_once_are_answered_as_by_transformers(seen) -> None:
    assert seen["cold"] == QUESTIONS
    assert seen["warm"] == QUESTIONS


def test_other_requests_in_the_batch_are_answered_as_ever(seen) -> None:
    assert seen["mixed"] == 3 + QUESTIONS
    assert seen["fetched"] == 4 + 2  # each once: the memories, a group of two of them, and one without budgets


def test_a_cache_too_small_for_all_evicts_preempts_and_stays_right(seen) -> None:
    assert seen["tight"] == [QUESTIONS, QUESTIONS]
    assert seen["preempted"] > 0
    assert seen["tight-fetched"] > 4
