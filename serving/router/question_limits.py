"""What a question may be: checked by the Router before any engine sees it."""

import asyncio
from pathlib import Path
from typing import Any

from serving import api
from serving.config import Profile
from serving.errors import ProblemError


class QuestionLimits:
    """The limits of one profile."""

    def __init__(self, profile: Profile) -> None:
        self._limits, self._longest = profile.limits, profile.memory.recall.longest_question
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

    def _tokens(self, text: str) -> int:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            local = self._model / "tokenizer.json"
            self._tokenizer = (
                Tokenizer.from_file(str(local)) if local.exists() else Tokenizer.from_pretrained(str(self._model))
            )
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
