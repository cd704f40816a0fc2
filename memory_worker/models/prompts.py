"""What the memory model reads around a text: the head before it, the instruction and question after it; and around
what it condenses to a gist.

The Memorizer encodes `head_tokens` once per memory; the Recaller appends `question_tokens`. One head serves every
kind, so all questions to a memory share it. The checkpoint's own chat template frames both.
"""

import hashlib
import json
from typing import Any, Literal

from memory_worker.messages import ClueKind, Language

PromptKind = ClueKind | Literal["answer"]

# Private-use characters, which no chat template contains or changes.
_TEXT = "\ue0f0"
_QUESTION = "\ue0f1"

_HEAD: dict[Language, str] = {
    "en": "Read the following text and remember it: you will be asked about it.\n\nThe text begins.\n",
    "zh": (
        "请仔细阅读并记住下面的文本，包括其中的人物、地点、事件、数字以及它们之间的联系。之后会有关于它的提问。"
        "\n\n文本开始。\n"
    ),
}

_END: dict[Language, str] = {"en": "\nThe text ends.\n\n", "zh": "\n文本结束。\n\n"}

_INSTRUCTIONS: dict[Language, dict[PromptKind, str]] = {
    "en": {
        # Short: they cost time at every question, and small models read them better. Trained adapters know these words.
        "span": (
            "Quote the sentences of the text that answer the question, word for word, one to a line, the best first. "
            "Write nothing else."
        ),
        "question": (
            "Ask the question again in the words and names of the text, as precise questions, one to a line. Write "
            "nothing else."
        ),
        "draft": "Answer the question from the text, with names, numbers and events, one statement to a line.",
        "key_point": (
            "List the key points of the text in order, each a full sentence, one to a line. Write nothing else."
        ),
        "answer": "Answer the question briefly from the text. If it does not say, write: The text does not say.",
    },
    "zh": {
        "span": (
            "要回答下面的问题，需要在文本中重新找到相关的段落。请回忆并尽可能逐字写出文本中与问题有关的短语和句子，"
            "每行一条，最重要的写在最前面。只写引文，不要写其他内容。"
        ),
        "question": (
            "下面的问题可能过于宽泛或含糊，不便直接用来检索文本。请把它改写成几个具体的问题，使这些问题的答案合起来"
            "能够回答原问题，并使用文本中出现的人名、地名、事物和时间。每行写一个问题，不要写其他内容。"
        ),
        "draft": (
            "请根据你对文本的记忆回答下面的问题。回答要具体，写出人名、数字和事件；不确定时写出最有可能的内容。"
            "每行写一句，只写答案。"
        ),
        "key_point": (
            "请按照在文本中出现的先后顺序列出文本的要点：写的是谁、是什么，发生或主张了什么，结果如何。"
            "每行写一条，每条都是可以独立理解的完整句子，不要写其他内容。"
        ),
        "answer": "请根据你对文本的记忆简明扼要地回答下面的问题。如果文本没有提到，请直接说明。",
    },
}

_GIST: dict[Language, tuple[str, str]] = {
    "en": (
        "Condense the passage below, which is a part of a longer text, to its gist, in at most {words} words. Keep the "
        "names, numbers, dates and places, who did or said what, and how events hang together; leave out what can be "
        "spared. Write plain sentences in the order of the passage, and nothing else.\n\nThe passage begins.\n",
        "\nThe passage ends.\n\nThe gist:",
    ),
    "zh": (
        "下面是一篇长文本中的一段。请把它浓缩成不超过{words}字的要点，保留人名、数字、日期和地点，谁做了或说了什么，"
        "以及事情之间的联系，省去可以省略的内容。请按原文的顺序写成平实的句子，不要写其他内容。\n\n段落开始。\n",
        "\n段落结束。\n\n要点：",
    ),
}

_REPEAT: dict[Language, tuple[str, str]] = {
    "en": (
        "\n\nRepeat the previous context exactly.",
        "\n\nRepeat the part of the previous context exactly, starting with",
    ),
    "zh": ("\n\n请逐字重复上面的文本。", "\n\n请逐字重复上面文本中的一部分，从这里开始："),
}

_ASK: dict[Language, str] = {"en": "\n\nQuestion:\n", "zh": "\n\n问题：\n"}


def mark_control_tokens(tokenizer: Any) -> Any:
    """`tokenizer`, for which `split_special_tokens` now covers all that has a token of its own, such as `<think>`.

    Of tokens that were merely added it knows nothing by itself: whoever wrote them in a text could act as the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # those in Python split all of them
        backend.add_special_tokens(list(tokenizer.added_tokens_decoder.values()))
    return tokenizer


def head_tokens(tokenizer: Any, language: Language) -> list[int]:
    """Token ids from the beginning of the conversation up to where the text stands.

    `tokenizer` is a Hugging Face tokenizer. The same for every question and kind.
    """
    before, _ = _render(tokenizer, language, _INSTRUCTIONS[language]["answer"])
    return _encode(tokenizer, before)


def question_tokens(tokenizer: Any, kind: PromptKind, question: str, language: Language) -> list[int]:
    """Token ids from the end of the text up to where the model begins to write.

    `question` is not used for key points. What looks like a special token in it is read as plain characters; like any
    control token, if `mark_control_tokens` was called.
    """
    instruction = _INSTRUCTIONS[language][kind]
    if kind == "key_point":
        return _encode(tokenizer, _render(tokenizer, language, instruction)[1])
    before, after = _render(tokenizer, language, f"{instruction}{_ASK[language]}{_QUESTION}")[1].split(_QUESTION)
    plain: list[int] = tokenizer.encode(question.strip(), add_special_tokens=False, split_special_tokens=True)
    return [*_encode(tokenizer, before), *plain, *_encode(tokenizer, after)]


def gist_frame(tokenizer: Any, language: Language, tokens: int) -> tuple[list[int], list[int]]:
    """Token ids before and after a text that the model is to condense to a gist of `tokens` tokens at most."""
    before, after = _GIST[language]
    words = tokens if language == "zh" else tokens * 2 // 3
    # A model that thinks aloud would spend the gist's tokens on that; templates that know no such switch ignore it.
    framed = _frame(tokenizer, before.format(words=words), after, enable_thinking=False)
    return _encode(tokenizer, framed[0]), _encode(tokenizer, framed[1])


def gist_prompts_digest() -> str:
    """Of the words that ask for gists: other words make other gists."""
    return hashlib.sha256(json.dumps(_GIST, sort_keys=True).encode()).hexdigest()


def repeat_frames(tokenizer: Any, language: Language) -> tuple[list[int], list[int], list[int]]:
    """Token ids between a text and its repetition: where all of it is repeated from its beginning; and, where it is
    from a later place, those before and after the tokens that stand before that place."""
    first, later = (_frame(tokenizer, "", told, enable_thinking=False)[1] for told in _REPEAT[language])
    told, after = _REPEAT[language][1], later[len(_REPEAT[language][1]) :]
    return _encode(tokenizer, first), _encode(tokenizer, told), _encode(tokenizer, after)


def repeat_prompts_digest() -> str:
    """Of the words by which a text is repeated: others score otherwise."""
    return hashlib.sha256(json.dumps(_REPEAT, sort_keys=True).encode()).hexdigest()


def _render(tokenizer: Any, language: Language, instruction: str) -> tuple[str, str]:
    """The conversation before and after the text."""
    return _frame(tokenizer, _HEAD[language], f"{_END[language]}{instruction}")


def _frame(tokenizer: Any, before: str, after: str, **template: Any) -> tuple[str, str]:
    """The conversation up to a text that follows `before`, and from `after` on up to where the model writes."""
    content = f"{before}{_TEXT}{after}"
    if getattr(tokenizer, "chat_template", None):
        # One user message: some templates know no system role, and those with a default system message add it.
        message = [{"role": "user", "content": content}]
        prompt: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **template)
    else:
        beginning = tokenizer.bos_token or ""
        prompt = f"{beginning}{content}\n\n"
    start, end = prompt.split(_TEXT)
    return start, end


def _encode(tokenizer: Any, text: str) -> list[int]:
    """The template already wrote the special tokens."""
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens
