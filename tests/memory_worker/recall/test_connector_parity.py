"""Stock vLLM over real memories says, token for token, what transformers and the reference implementation say."""

from typing import Any

import pytest

from tests.support.scenarios import ROOT

SHARED = ROOT.parent / "shared"
QUESTIONS = 32
TOKENS = 24  # of each answer; what an answer that failed shows instead is its finish reason


@pytest.fixture(scope="module")
def seen(seen_by_engines: dict[str, Any]) -> dict[str, Any]:
    return seen_by_engines["recall"]


@pytest.fixture(scope="module")
def seen_long(seen_in_long: dict[str, Any]) -> dict[str, Any]:
    return seen_in_long["recall"]


def test_questions_to_four_memories_at_once_are_answered_as_by_transformers(seen) -> None:
    assert seen["concurrent"]["right"] == QUESTIONS


def test_a_memory_is_loaded_once_however_many_questions_arrive_cold(seen) -> None:
    loads = seen["concurrent"]["loads"]
    assert loads["fetched"] == 4
    assert loads["rotated_slots"] == 256 + 250 + 33 + 20
    # of the last, partial blocks each question gets its own: 24 of the 32 questions are to memories that have one
    assert loads["tail_hits"] == 21
    assert loads["failed"] == 0


def test_what_was_loaded_is_shared_with_later_questions(seen) -> None:
    assert seen["warm"]["right"] == QUESTIONS
    assert seen["warm"]["loads"]["fetched"] == 4
    assert seen["warm"]["loads"]["rotated_slots"] == seen["concurrent"]["loads"]["rotated_slots"]


def test_two_memories_of_as_many_slots_never_answer_for_each_other(seen) -> None:
    assert seen["twins"] == {"differ": True, "apart": 2, "together": 2}


def test_segments_of_several_memories_behind_one_head_are_answered_as_by_transformers(seen) -> None:
    assert seen["composed"] == {"right": 6, "different": 6, "fetched": 3}


def test_a_request_without_a_salt_is_refused(seen) -> None:
    assert seen["unsalted"] == ["error"]


def test_a_load_that_fails_fails_its_own_request_only_and_can_be_tried_again(seen) -> None:
    # missing, wrong slot count, wrong shape, nothing beside it, malformed name, no such segment, another tenant's
    assert seen["failures"] == {"answers": ["error"] * 7, "others": QUESTIONS, "retried": 4}


def test_a_cache_too_small_for_all_evicts_preempts_and_stays_right(seen) -> None:
    tight = seen["tight"]
    assert tight["right"] == [QUESTIONS, QUESTIONS]
    assert tight["preempted"] > 0
    assert tight["loads"]["fetched"] > 4  # blocks were evicted and loaded again


@pytest.mark.long
def test_tensor_parallel_ranks_load_their_own_heads(seen_long) -> None:
    assert seen_long["tensor_parallel"] == {"right": 8, "fetched": [4, 4]}


@pytest.mark.long
def test_a_memory_of_another_dtype_than_the_cache_is_cast(seen_long) -> None:
    assert seen_long["bfloat16"]["answered"] == 4


@pytest.mark.long
def test_a_qwen3_memory_is_recalled_as_by_transformers(seen_long) -> None:
    assert seen_long["qwen3"] == {"right": 4, "different": 4}


@pytest.mark.skipif(
    not (SHARED / "goldens").exists(), reason="the reference tensors, shared/goldens, are not beside the checkout"
)
@pytest.mark.parametrize("which", ["seen", pytest.param("seen_long", marks=pytest.mark.long)])
def test_the_reference_implementations_memories_continue_as_they_did_there(
    request: pytest.FixtureRequest, which: str
) -> None:
    """The first model's in the short form, those of the others in the long one."""
    found = request.getfixturevalue(which)["goldens"]
    folders = [path.name for path in sorted((SHARED / "goldens").iterdir())]
    assert sorted(found) == (folders[:1] if which == "seen" else folders[1:])
    for cases in found.values():
        assert len(cases) >= 2
        assert all(cases.values()), found
