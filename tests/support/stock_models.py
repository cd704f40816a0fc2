"""Small random checkpoints as transformers writes them, of families that `BeaconModel` reads and that it does not."""

import json
import shutil
from pathlib import Path
from typing import Any

# What is peculiar about each: how it turns keys, or what it does beside.
MADE: dict[str, dict[str, Any]] = {
    "phi3": {},  # query, key and value in one matrix
    "gemma": {"head_dim": 64},  # heads wider than the hidden state's share; embeddings are scaled
    "glm": {"head_dim": 64, "partial_rotary_factor": 0.5},  # half of each head turns, neighbours together
    "glm4": {"head_dim": 64, "partial_rotary_factor": 0.5},
    "stablelm": {},  # a quarter of each head turns
    "gpt_neox": {},  # likewise; attention and MLP side by side
    "phi": {},
    "olmo2": {},  # norms of queries and keys, over all heads together
    "granite": {"attention_multiplier": 0.2},
    "cohere": {"use_qk_norm": True},  # neighbours turn together
    "smollm3": {"no_rope_layers": [1, 0, 1]},  # a layer without positions
    "starcoder2": {"sliding_window": None},
    "nemotron": {},
    "ernie4_5": {},
}
REFUSED: dict[str, dict[str, Any]] = {
    "gpt2": {},  # learned positions
    "opt": {"word_embed_proj_dim": 128},
    "bloom": {},  # ALiBi
    "gemma2": {},  # every other layer slides
    "gemma3_text": {},
    "mamba": {},  # no keys
    "jamba": {"num_experts": 2, "use_mamba_kernels": False},  # some layers have none
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},  # latent attention
    "gptj": {"rotary_dim": 16},
}


def write_model(folder: Path, family: str, tokenizer: Path, vocabulary: int = 4096, **changes: Any) -> Path:
    """A checkpoint of three layers, with the tokenizer of another."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "initializer_range": 0.15,  # so that what it writes hangs on what it reads
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **(settings | MADE.get(family, {}) | REFUSED.get(family, {}) | changes))
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def add_beacons(folder: Path, window: int = 64) -> Path:
    """Gives a checkpoint of one of the `FAMILIES` beacon weights: the stock ones and some noise."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name, weight in [*weights.items()]:
        if name.endswith(tuple(f"self_attn.{part}_proj.weight" for part in "qkv")):
            beacon = name.replace("self_attn.", "self_attn.beacon_")
            weights[beacon] = weight + 0.05 * torch.randn_like(weight)
    embedding = weights["model.embed_tokens.weight"]
    weights["model.beacon_embed_tokens.weight"] = torch.randn(1, embedding.shape[1]) * embedding.std()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"beacon_window": window, "beacon_ratio": [2, 4, 8]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder
