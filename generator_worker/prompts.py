"""The prompts answers and summaries are generated from, and how they are fitted into a context window.

Called by the generators, with the model's own tokenizer.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from generator_worker.errors import QuestionTooLong
from generator_worker.messages import GenerateRequest, Source

_INSTRUCTIONS = {
    ("answer", "en"): (
        "Answer the question from the numbered passages below and from nothing else. After each statement name the "
        "passages it rests on by their numbers in square brackets, like [1] or [2][3]. If the passages do not hold "
        "the answer, say so. Be brief."
    ),
    ("answer", "zh"): (
        "请只根据下面编号的段落回答问题。每个论断之后，用方括号注明所依据的段落编号，例如 [1] 或 [2][3]。"
        "如果段落中没有答案，请直接说明。回答要简洁。"
    ),
    ("summarize", "en"): (
        "Summarize the text that the numbered passages below were taken from: what it is about, what happens or is "
        "argued, and how it ends. Use nothing but the passages. After each statement name the passages it rests on by "
        "their numbers in square brackets, like [1] or [2][3]."
    ),
    ("summarize", "zh"): (
        "下面编号的段落摘自同一文本。请概括该文本：主题是什么，发生或论述了什么，结果如何。只能依据这些段落。"
        "每个论断之后，用方括号注明所依据的段落编号，例如 [1] 或 [2][3]。"
    ),
}
_LABELS = {
    "en": {
        "passages": "Passages:",
        "none": "(none)",
        "question": "Question: ",
        "answer": "Answer:",
        "summary": "Summary:",
    },
    "zh": {
        "passages": "段落：",
        "none": "（无）",
        "question": "问题：",
        "answer": "回答：",
        "summary": "摘要：",
    },
}
# Without a chat template a model does not know where its turn ends: it goes on with a question of its own.
_PLAIN_STOP = ("\nQuestion:", "\n问题：", "\nPassages:", "\n段落：")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that fits the context window together with `max_tokens` of answer."""

    messages: tuple[dict[str, str], ...]  # chat form
    token_ids: list[int]  # the same, as the model's tokenizer and chat template give it
    sources: tuple[Source, ...]  # those of the request it holds, in order; the first is passage 1
    max_tokens: int
    stop: list[str]


def build_prompt(tokenizer: Any, request: GenerateRequest, max_model_len: int, max_tokens: int) -> Prompt:
    """The prompt of `request`, never beyond `max_model_len` tokens together with its answer.

    Room for `max_tokens` of answer is kept, but no more than half the window; of the sources the lowest-scored
    (of equals the later) are left out until the rest fit. `max_tokens` is cut to what is left in the end.
    Raises `QuestionTooLong` if not even the prompt without sources fits.
    """
    limit = max_model_len - min(max_tokens, max_model_len // 2)
    ranked = sorted(range(len(request.sources)), key=lambda i: (-request.sources[i].score, i))

    def attempt(count: int) -> Prompt:
        kept = tuple(request.sources[i] for i in sorted(ranked[:count]))
        messages, ids = _render(tokenizer, request, kept)
        left = min(max_tokens, max_model_len - len(ids))
        plain = not getattr(tokenizer, "chat_template", None)
        return Prompt(messages, ids, kept, left, list(_PLAIN_STOP) if plain else [])

    best = attempt(len(ranked))
    if len(best.token_ids) <= limit:
        return best
    fits, over = 0, len(ranked)  # the most sources that fit are in [fits, over)
    best = attempt(0)
    if best.max_tokens < 1:
        raise QuestionTooLong(len(best.token_ids), max_model_len)
    while over - fits > 1:
        middle = (fits + over) // 2
        candidate = attempt(middle)
        if len(candidate.token_ids) <= limit:
            fits, best = middle, candidate
        else:
            over = middle
    return best


class PromptBudget:
    """Prompts that fit, made off the event loop; one thread, because tokenizers are not safe for several."""

    def __init__(self, tokenizer: Any, max_model_len: int, max_answer_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._max_answer_tokens = max_answer_tokens
        self._thread = ThreadPoolExecutor(1, "prompts")

    async def prompt(self, request: GenerateRequest) -> Prompt:
        wanted = self._max_answer_tokens if request.max_tokens is None else request.max_tokens
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, build_prompt, self._tokenizer, request, self._max_model_len, wanted
        )


def _render(
    tokenizer: Any, request: GenerateRequest, sources: tuple[Source, ...]
) -> tuple[tuple[dict[str, str], ...], list[int]]:
    labels = _LABELS[request.language]
    passages = "\n\n".join(f"[{n}] {source.text.strip()}" for n, source in enumerate(sources, 1))
    parts = [_INSTRUCTIONS[request.task, request.language], f"{labels['passages']}\n\n{passages or labels['none']}"]
    if request.task == "answer":
        parts.append(f"{labels['question']}{request.question.strip()}")
    text = _without_special_tokens(tokenizer, "\n\n".join(parts))
    # One user message: several published chat templates refuse a system message.
    messages = ({"role": "user", "content": text},)
    if getattr(tokenizer, "chat_template", None):
        chat = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return messages, tokenizer.encode(chat, add_special_tokens=False)
    ending = labels["answer" if request.task == "answer" else "summary"]
    return messages, tokenizer.encode(f"{text}\n\n{ending}")


def _without_special_tokens(tokenizer: Any, text: str) -> str:
    """`text` with a space inside whatever the tokenizer would take for a control token, such as an end of turn."""
    for token in tokenizer.all_special_tokens:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
