"""The prompts answers and summaries are generated from, and how they are fitted into a context window.

Called by the generators, with the model's own tokenizer.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from generator_worker.errors import QuestionTooLong
from generator_worker.messages import GenerateRequest

_INSTRUCTIONS = {
    # Short: they cost time at every question, and small models read them better. Trained adapters know these words.
    ("answer", "en"): (
        "Answer briefly from the passages alone, and cite them like [1]. If they do not hold the answer, write: The "
        "passages do not say."
    ),
    ("answer", "zh"): (
        "请只根据下面编号的段落回答问题。每个论断之后，用方括号注明所依据的段落编号，例如 [1] 或 [2][3]。"
        "如果段落中没有答案，请直接说明。回答要简洁。"
    ),
    ("summarize", "en"): (
        "Summarize the text that the passages are parts of, from the passages alone: what it is about, what happens "
        "or is argued, and how it ends. Cite them like [1]."
    ),
    ("summarize", "zh"): (
        "下面编号的段落摘自同一文本。请概括该文本：主题是什么，发生或论述了什么，结果如何。只能依据这些段落。"
        "每个论断之后，用方括号注明所依据的段落编号，例如 [1] 或 [2][3]。"
    ),
    ("short", "en"): "Answer the question from the passages alone.",
    ("short", "zh"): "请只根据下面编号的段落回答问题。",
    ("full", "en"): (
        "Answer briefly from the text alone. If it does not hold the answer, write: The text does not say."
    ),
    ("full", "zh"): "请只根据下面的文本回答问题。如果文本中没有答案，请直接说明。回答要简洁。",
    # HyDE (Gao et al., ACL 2023, arXiv 2212.10496): a made-up passage lies near the real one.
    (
        "hyde",
        "en",
    ): "Write a short passage of a text that answers the question below. Write nothing but the passage.",
    ("hyde", "zh"): "请写一小段能够回答下面问题的文字。只写这段文字，不要写其他内容。",
    ("rewrite", "en"): (
        "A text is to be searched for what answers the question below. Write up to four precise search queries, one "
        "to a line, and nothing else."
    ),
    ("rewrite", "zh"): "需要在一篇文本中检索下面问题的答案。请写出最多四条具体的检索语句，每行一条，不要写其他内容。",
    ("whole", "en"): (
        "Below are a conversation and the question that follows it. Write that question so that it can be understood "
        "without the conversation: names in place of words like he, it or there. Write nothing else."
    ),
    ("whole", "zh"): (
        "下面是一段对话以及随后的一个问题。请改写这个问题，使它脱离对话也能看懂：用具体的名称代替“他”“它”“那里”等词。"
        "只写改写后的问题。"
    ),
}
_SHORT = {
    "en": "Answer with a word or a short phrase.",
    "zh": "只用一个词或短语回答，不要解释。",
}
_LABELS = {
    "en": {
        "passages": "Passages:",
        "text": "Text:",
        "conversation": "Conversation:",
        "none": "(none)",
        "question": "Question: ",
        "answer": "Answer:",
        "full": "Answer:",
        "summarize": "Summary:",
        "hyde": "Passage:",
        "rewrite": "Queries:",
        "whole": "Question, complete:",
    },
    "zh": {
        "passages": "段落：",
        "text": "文本：",
        "conversation": "对话：",
        "none": "（无）",
        "question": "问题：",
        "answer": "回答：",
        "full": "回答：",
        "summarize": "摘要：",
        "hyde": "文字：",
        "rewrite": "检索语句：",
        "whole": "完整的问题：",
    },
}
_MOST_CHARACTERS_PER_TOKEN = 16  # on average over a long text; English has some 4
# Without a chat template a model does not know where its turn ends: it goes on with a question of its own.
_PLAIN_STOP = ("\nQuestion:", "\n问题：", "\nPassages:", "\n段落：")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that fits the context window together with `max_tokens` of answer."""

    messages: tuple[dict[str, str], ...]  # chat form
    token_ids: list[int]  # the same, as the model's tokenizer and chat template give it
    sources: tuple[int, ...]  # indices of those of the request it holds, ascending; the first is passage 1
    max_tokens: int
    stop: list[str]
    cut: bool = False  # the middle of a whole text was left out


def build_prompt(tokenizer: Any, request: GenerateRequest, max_model_len: int, max_tokens: int) -> Prompt:
    """The prompt of `request`, never beyond `max_model_len` tokens together with its answer.

    Room for `max_tokens` of answer is kept, but no more than half the window; of the sources the lowest-scored
    (of equals the later) are left out until the rest fit; of a whole text (`full`) the middle, as LongBench does.
    `max_tokens` is cut to what is left in the end. Raises `QuestionTooLong` if not even that without sources fits.
    """
    if request.task == "full":
        return _full_prompt(tokenizer, request, max_model_len, max_tokens)
    limit = max_model_len - min(max_tokens, max_model_len // 2)
    ranked = sorted(range(len(request.sources)), key=lambda i: (-request.sources[i].score, i))

    def attempt(count: int) -> Prompt:
        kept = tuple(sorted(ranked[:count]))
        messages, ids = _render(tokenizer, request, [request.sources[i].text for i in kept])
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


def _full_prompt(tokenizer: Any, request: GenerateRequest, max_model_len: int, max_tokens: int) -> Prompt:
    """`build_prompt` of a whole text. Beginning and end are kept alike (Liu et al., TACL 2024: what is read best)."""
    limit = max_model_len - min(max_tokens, max_model_len // 2)
    text = "\n\n".join(source.text for source in request.sources)
    most = limit * _MOST_CHARACTERS_PER_TOKEN  # a longer text is cut so far before it is counted, which takes time
    kept = text if len(text) <= most else text[: most // 2] + text[-(most // 2) :]
    offsets = tokenizer(kept, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    room = min(len(offsets), limit)
    while True:
        whole = room >= len(offsets) and len(kept) == len(text)
        half = room // 2
        ends = (offsets[half - 1][1] if half else 0, offsets[len(offsets) - half][0] if half else len(kept))
        part = kept if whole else f"{kept[: ends[0]]}\n…\n{kept[ends[1] :]}"
        messages, ids = _render(tokenizer, request, [part] if part.strip() else [])
        left = min(max_tokens, max_model_len - len(ids))
        if len(ids) <= limit or (not room and left > 0):
            plain = not getattr(tokenizer, "chat_template", None)
            return Prompt(messages, ids, (), left, list(_PLAIN_STOP) if plain else [], cut=not whole)
        if not room:
            raise QuestionTooLong(len(ids), max_model_len)
        room = max(0, room - max(2, len(ids) - limit))


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


def write_message(request: GenerateRequest, texts: Sequence[str]) -> str:
    """What the user's message of `request` says, with `texts` as its sources: also what a generator is trained on."""
    labels = _LABELS[request.language]
    instructions = "short" if request.short and request.task == "answer" else request.task
    parts = [_INSTRUCTIONS[instructions, request.language]]
    if request.system and request.system.strip():
        parts.insert(0, request.system.strip())
    if request.task == "full":
        parts.append("\n\n".join([labels["text"], *map(str.strip, texts)]))
    elif request.task == "whole":
        parts.append("\n".join([labels["conversation"], *map(str.strip, texts)]))
    elif request.task in ("answer", "summarize"):
        passages = "\n\n".join(f"[{n}] {text.strip()}" for n, text in enumerate(texts, 1))
        parts.append(f"{labels['passages']}\n\n{passages or labels['none']}")
    if request.task != "summarize":
        parts.append(f"{labels['question']}{request.question.strip()}")
    if request.short:
        parts.append(_SHORT[request.language])
    return "\n\n".join(parts)


def _render(
    tokenizer: Any, request: GenerateRequest, texts: Sequence[str]
) -> tuple[tuple[dict[str, str], ...], list[int]]:
    plain = partial(_break_tokens, _control_tokens(tokenizer))
    broken = replace(request, question=plain(request.question), system=plain(request.system or ""))
    text = write_message(broken, list(map(plain, texts)))
    # One user message: several published chat templates refuse a system message.
    messages = ({"role": "user", "content": text},)
    if getattr(tokenizer, "chat_template", None):
        chat = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return messages, tokenizer.encode(chat, add_special_tokens=False)
    return messages, tokenizer.encode(f"{text}\n\n{_LABELS[request.language][request.task]}")


def _control_tokens(tokenizer: Any) -> list[str]:
    """Whatever has a token of its own, such as an end of turn, special or merely added; always in the same order."""
    known = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
    return [token for token in known if len(token) > 1]


def _break_tokens(tokens: Sequence[str], text: str) -> str:
    """`text` with a space inside each of `tokens`."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
