"""What a new checkpoint of Qwen2 shape with beacons is made of, its weights apart: config.json and tokenizer.

Both the embedded model and models that training begins with are made of it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
PADDING, END_OF_TURN = 0, 2

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen2_config(
    *,
    vocabulary: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp: int,
    window: int,
    ratios: Sequence[int],
    rope_theta: float,
    max_positions: int,
    tied: bool,
) -> dict[str, Any]:
    """The config.json: the keys of Qwen2, and those of the published memory models."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": max_positions,
        "rope_theta": rope_theta,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "pad_token_id": PADDING,
        "eos_token_id": END_OF_TURN,
        "torch_dtype": "float32",
        "beacon_window": window,
        "beacon_stride": window,
        "beacon_ratio": list(ratios),
        "beacon_attn": "full-coverage",
        "beacon_attend_prev": True,
        "beacon_pos": "interleave",
        "beacon_param": ["q", "k", "v"],
        "beacon_embed_init": "eos",
        "beacon_sink_size": 0,
    }


def write_tokenizer(
    folder: Path, texts: Iterable[str], vocabulary: int, phrases: Iterable[str] = (), template: str = _CHAT_TEMPLATE
) -> int:
    """Trains a byte-level BPE tokenizer on `texts` and writes its files to `folder`; returns the tokens in all.

    `vocabulary` counts bytes, merges and special tokens; `phrases` come on top, each a token of its own.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Qwen2's own, which transformers uses for a checkpoint of that type whatever its tokenizer.json says.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
        "eos_token": SPECIAL_TOKENS[END_OF_TURN],
        "pad_token": SPECIAL_TOKENS[PADDING],
        "additional_special_tokens": [SPECIAL_TOKENS[1]],
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return int(tokenizer.get_vocab_size())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The same bytes for the same values, whatever their order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
