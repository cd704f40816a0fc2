"""Which questions need what was said before, and how much of that is read."""

import pytest

from serving import api
from serving.router.conversation import recent_turns, stands_alone

TURNS = [
    api.Turn(role="user", content="Who kept the gate?"),
    api.Turn(role="assistant", content=" Anna kept it. "),
    api.Turn(role="user", content="Of which town?"),
]


@pytest.mark.parametrize(
    "question",
    ["When did she leave?", "And the lamp?", "Why?", "What about Boris?", "Where is it?", "Who else?", "Tell me more."],
)
def test_a_question_that_points_back(question: str) -> None:
    assert not stands_alone(question, "en")


@pytest.mark.parametrize("question", ["When did Anna leave the town of Kirsund?", "Who lit the lamp of the gate?"])
def test_a_question_that_stands_alone(question: str) -> None:
    assert stands_alone(question, "en")


def test_chinese() -> None:
    assert not stands_alone("她什么时候离开的？", "zh") and not stands_alone("城门呢？", "zh")
    assert stands_alone("安娜什么时候离开城市？", "zh")


def test_the_oldest_turns_go_first() -> None:
    whole = ["User: Who kept the gate?", "Assistant: Anna kept it.", "User: Of which town?"]
    assert recent_turns(TURNS, 1000, "en") == whole
    assert recent_turns(TURNS, 27, "en") == whole[1:]
    assert recent_turns(TURNS, 14, "en") == whole[2:]
    assert recent_turns(TURNS, 5, "en") == ["User: …town?"]
    assert recent_turns(TURNS, 0, "en") == []
