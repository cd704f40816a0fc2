"""What a question may be: checked by the Router before any engine sees it."""

import asyncio
from pathlib import Path
from typing import Any

from serving import api
from serving.config import Profile
from serving.errors import ProblemError
from serving.router.versions import AskedVersions


class QuestionLimits:
    """The limits of one profile."""

    def __init__(self, profile: Profile) -> None:
        self._limits, self._longest = profile.limits, profile.memory.recall.longest_question
        self._memory = profile.memory
        self._model = Path(profile.memory.engine.model)
        self._tokenizer: Any = None

    async def check(self, question: api.Question) -> None:
        """Raises `ProblemError` for a question that is empty, too long, or asks for too much."""
        limits, text = self._limits, question.question
        if question.task != "summarize" and not text.strip():
            raise ProblemError(422, "the question is empty; ask something")
        if question.max_tokens is not None and question.max_tokens > limits.answer_tokens:
            raise ProblemError(
                422, f"max_tokens is {question.max_tokens}; at most {limits.answer_tokens} can be asked for"
            )
        if len(text) <= self._longest // 4:  # a token is at least one byte of UTF-8, a character at most four
            return
        if len(text) > limits.question_characters:
            raise ProblemError(
                413,
                f"the question has {len(text)} characters, and limits.question_characters is "
                f"{limits.question_characters}; memorize long texts instead",
            )
        if (tokens := await asyncio.to_thread(self._tokens, text)) > self._longest:
            raise ProblemError(
                422,
                f"the question has {tokens} tokens; beside a memory, the model's window has room for {self._longest} "
                "(recall.question_tokens): memorize long texts instead",
            )

    async def check_answer_from_memory(self, asked: AskedVersions, question: api.Question) -> None:
        """Raises `ProblemError` where memories, question and answer do not fit one prompt: task 'memory' has one only.

        Slots and tokens are places of the same window.
        """
        window, recall = self._memory.engine.max_model_len, self._memory.recall
        if len(kinds := {manifest.kind for manifest in asked.manifests}) > 1:
            raise ProblemError(
                422,
                f"memories of the kinds {' and '.join(sorted(kinds))} cannot be read together, and the task 'memory' "
                "answers from one reading: ask them apart, or with the task 'memorag'",
            )
        answer = question.max_tokens or recall.max_answer_tokens
        if len(asked.groups) > 1:
            slots = asked.manifests[0].head_slots + sum(m.slots - m.head_slots for m in asked.manifests)
            raise ProblemError(
                422,
                f"what is asked has {slots:,} slots, and the task 'memory' reads all of them at once: the model's "
                f"window of {window:,} tokens holds {self._memory.group_slots:,} beside question and answer. Ask with "
                "the task 'memorag', which reads them group by group, or memorize at a higher ratio",
            )
        slots, tokens = asked.groups[0].slots, await asyncio.to_thread(self._tokens, question.question)
        if slots + tokens + answer >= window:  # what stands around the question takes some, too
            raise ProblemError(
                422,
                f"{slots:,} memory slots, {tokens:,} tokens of the question and {answer:,} of the answer do not fit "
                f"the model's window of {window:,} tokens: ask for max_tokens of "
                f"{window - slots - recall.question_tokens:,} or less, or with the task 'memorag'",
            )

    def _tokens(self, text: str) -> int:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            local = self._model / "tokenizer.json"
            self._tokenizer = (
                Tokenizer.from_file(str(local)) if local.exists() else Tokenizer.from_pretrained(str(self._model))
            )
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
