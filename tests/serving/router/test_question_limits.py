"""Questions are measured by what the memory model reads, and refused before it is asked."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.storage.durable import Storage
from memory_worker.config import INSTRUCTION_TOKENS
from memory_worker.manifest import MemoryKey
from serving import api
from serving.config import parse_profile
from serving.errors import ProblemError
from serving.router.question_limits import QuestionLimits
from serving.router.versions import AskedVersions
from tests.support import manifests

GROUP_SLOTS = 1000 - 256 - (INSTRUCTION_TOKENS + 16)  # of the window, beside an answer and a question


@pytest.fixture
def limits(tmp_path) -> QuestionLimits:
    """Of a model whose tokens are words."""
    words = Tokenizer(models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    recall = f"{{question_tokens: {INSTRUCTION_TOKENS + 16}}}"
    engine = f"{{model: {tmp_path}, max_model_len: 1000}}"
    text = f"memory: {{engine: {engine}, recall: {recall}}}\ngenerator: {{engine: {{model: b}}}}\n"
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


def memories(tmp_path: Path, slots: int, *kinds: str) -> AskedVersions:
    """One memory of each kind, of so many slots with its head's three."""
    made = []
    for number, kind in enumerate(kinds):
        manifest = manifests.memory(Storage(str(tmp_path)), MemoryKey("acme", f"book-{number}", "v1"), ("a",))
        segment = manifest.documents[0].segments[0].model_copy(update={"slots": slots - 3})
        document = manifest.documents[0].model_copy(update={"segments": (segment,)})
        made.append(manifest.model_copy(update={"documents": (document,), "kind": kind}))
    return AskedVersions(tuple(made), GROUP_SLOTS)


@pytest.mark.parametrize(
    ("slots", "kinds", "question", "words"),
    [
        (GROUP_SLOTS, ["beacon"], asked("word " * 16), None),
        (GROUP_SLOTS, ["beacon"], asked("word", max_tokens=600), None),
        (
            GROUP_SLOTS, ["beacon"], asked("word " * 8, max_tokens=1000 - GROUP_SLOTS - 8),
            "344 memory slots, 8 tokens of the question and 648 of the answer do not fit the model's window of 1,000 "
            "tokens: ask for max_tokens of 256 or less",
        ),
        (
            300, ["beacon", "beacon"], asked("word"),
            "what is asked has 597 slots, .* the model's window of 1,000 tokens holds 344 beside",
        ),
        (100, ["beacon", "gist"], asked("word"), "memories of the kinds beacon and gist cannot be read together"),
    ],
)  # fmt: skip
async def test_an_answer_from_memory_is_one_prompt(
    limits: QuestionLimits, tmp_path: Path, slots: int, kinds: list[str], question: api.Question, words: str | None
) -> None:
    asked_of = memories(tmp_path, slots, *kinds)
    if words is None:
        await limits.check_answer_from_memory(asked_of, question)
        return
    with pytest.raises(ProblemError, match=words) as refused:
        await limits.check_answer_from_memory(asked_of, question)
    assert refused.value.status == 422
