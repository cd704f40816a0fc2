"""Questions are measured by what the memory model reads, and refused before it is asked."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from memory_worker.config import INSTRUCTION_TOKENS
from serving import api
from serving.config import parse_profile
from serving.errors import ProblemError
from serving.router.question_limits import QuestionLimits


@pytest.fixture
def limits(tmp_path) -> QuestionLimits:
    """Of a model whose tokens are words."""
    words = Tokenizer(models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    recall = f"{{question_tokens: {INSTRUCTION_TOKENS + 16}}}"
    text = f"memory: {{engine: {{model: {tmp_path}}}, recall: {recall}}}\ngenerator: {{engine: {{model: b}}}}\n"
    return QuestionLimits(parse_profile(text + "limits: {question_characters: 1000, answer_tokens: 50}", "mine"))


def asked(text: str, **fields) -> api.Question:
    return api.Question.model_construct(**{"question": text, "task": "memorag", "max_tokens": None} | fields)


@pytest.mark.parametrize(
    "question",
    [asked("word?"), asked("word " * 16), asked("x" * 1000), asked("word", max_tokens=50), asked("", task="summarize")],
)
async def test_what_fits_is_taken(limits: QuestionLimits, question: api.Question) -> None:
    await limits.check(question)


@pytest.mark.parametrize(
    ("question", "status", "words"),
    [
        (asked(""), 422, "empty"),
        (asked(" \n\u3000"), 422, "empty"),
        (asked("word", max_tokens=51), 422, "at most 50"),
        (asked("word " * 17), 422, "17 tokens; beside a memory, the model's window has room for 16"),
        (asked("x" * 1001), 413, "limits.question_characters is 1000"),
    ],
)
async def test_what_does_not_says_why(limits: QuestionLimits, question: api.Question, status: int, words: str) -> None:
    with pytest.raises(ProblemError, match=words) as refused:
        await limits.check(question)
    assert refused.value.status == status
