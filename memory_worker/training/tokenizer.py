"""A small byte-level BPE tokenizer, made from the texts that a model is trained on.

A small vocabulary makes copying easy to learn: few rows to tell apart, and each seen often. The fixed phrases
around every text and question are one token each, so that a small model spends no attention on them.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memory_worker.prompts import PromptKind, head_tokens, question_tokens

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
END_OF_TURN = 2

_ROLES = ("user\n", "assistant\n")  # as the chat template writes them

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int, phrases: Sequence[str] = ()) -> int:
    """Trains on `texts` and writes tokenizer.json and tokenizer_config.json to `folder`; returns the tokens in all.

    `vocabulary` counts bytes, merges and special tokens; the memory prompts' own phrases and `phrases` come on top.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fixed = dict.fromkeys((*_ROLES, *memory_phrases(), *phrases))
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in fixed])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _CHAT_TEMPLATE,
        "eos_token": SPECIAL_TOKENS[END_OF_TURN],
        "pad_token": SPECIAL_TOKENS[0],
        "additional_special_tokens": [SPECIAL_TOKENS[1]],
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    return int(tokenizer.get_vocab_size())


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
