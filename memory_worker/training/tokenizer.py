"""A small byte-level BPE tokenizer, made from the texts that a model is trained on.

A small vocabulary makes copying easy to learn: few rows to tell apart, and each seen often. The fixed phrases
around every text and question are one token each, so that a small model spends no attention on them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memory_worker.models.prompts import PromptKind, head_tokens, question_tokens
from memory_worker.models.qwen2 import write_tokenizer

# One token after each message, and none before: a small model need not carry a question over a header.
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


def write_training_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int, phrases: Sequence[str] = ()) -> int:
    """As `memory_worker.models.qwen2.write_tokenizer`; the memory prompts' own phrases come on top as well."""
    return write_tokenizer(folder, texts, vocabulary, dict.fromkeys((*memory_phrases(), *phrases)), _TEMPLATE)


def memory_phrases() -> list[str]:
    """What stands, in English, before every text and between a text and each kind of question."""
    plain = _Verbatim()
    kinds: tuple[PromptKind, ...] = ("span", "question", "draft", "answer")
    before = [str(part) for part in head_tokens(plain, "en")]
    after = [str(question_tokens(plain, kind, "?", "en")[0]) for kind in kinds]
    return [*before, *after, str(question_tokens(plain, "key_point", "", "en")[0]).rstrip("\n")]


class _Verbatim:
    """Stands in for a tokenizer where the words of a prompt are wanted: each text is one token, itself."""

    chat_template = None
    bos_token = ""

    def encode(self, text: str, **_: Any) -> list[Any]:
        return [text] if text else []
