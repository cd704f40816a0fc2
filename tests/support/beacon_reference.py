"""The memory recipe written out plainly, one window after another, and random checkpoints to try it on.

Independent of the product: plain matrices, explicit masks, RoPE by transformers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCABULARY = 211


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    mlp: int = 96,
    model_type: str = "qwen2",
    bias: bool = True,
    beacons: bool = True,
    tied: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random checkpoint in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    weights = {
        "model.embed_tokens.weight": random(VOCABULARY, hidden) * hidden**0.5,
        "model.norm.weight": 1 + random(hidden),
    }
    if not tied:
        weights["lm_head.weight"] = random(VOCABULARY, hidden)
    if beacons:
        weights["model.beacon_embed_tokens.weight"] = random(1, hidden) * hidden**0.5
    for index in range(layers):
        layer = f"model.layers.{index}"
        for prefix in ("", "beacon_") if beacons else ("",):
            for name, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                weights[f"{layer}.self_attn.{prefix}{name}_proj.weight"] = 2 * random(size * head_dim, hidden)
                if bias:
                    weights[f"{layer}.self_attn.{prefix}{name}_proj.bias"] = random(size * head_dim)
        weights[f"{layer}.self_attn.o_proj.weight"] = random(hidden, heads * head_dim)
        weights[f"{layer}.mlp.gate_proj.weight"] = random(mlp, hidden)
        weights[f"{layer}.mlp.up_proj.weight"] = random(mlp, hidden)
        weights[f"{layer}.mlp.down_proj.weight"] = random(hidden, mlp)
        weights[f"{layer}.input_layernorm.weight"] = 1 + random(hidden)
        weights[f"{layer}.post_attention_layernorm.weight"] = 1 + random(hidden)
    content = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(content))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = sorted(weights)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


class Reference:
    """The recipe, slowly, in float32, for a checkpoint in one file."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        stock = AutoConfig.from_pretrained(folder)
        self.rotary = LlamaRotaryEmbedding(config=stock)

    def compress(
        self, tokens: Tensor, *, ratio: int, window: int, head: int = 0, memory: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, kv_heads, slots, head_dim] of `memory` and of `tokens`."""
        keys, values = memory or (None, None)
        if head:
            _, keys, values = self._feed([int(t) for t in tokens[:head]], keys, values, keep="all")
        for start in range(head, len(tokens), window):
            row: list[int] = []
            piece = [int(t) for t in tokens[start : start + window]]
            for at in range(0, len(piece), ratio):
                row += [*piece[at : at + ratio], -1]
            _, keys, values = self._feed(row, keys, values, keep="beacons")
        return keys, values

    def logits(self, tokens: Tensor, memory: tuple[Tensor, Tensor] | None) -> Tensor:
        hidden, _, _ = self._feed([int(t) for t in tokens], *(memory or (None, None)), keep="all")
        return hidden @ self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"]).T

    def _feed(self, row: list[int], keys: Any, values: Any, keep: str) -> tuple[Tensor, Tensor, Tensor]:
        w, c = self.weights, self.config
        heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        before = 0 if keys is None else keys.shape[2]
        ids = torch.tensor(row)
        beacon = ids < 0
        x = w["model.embed_tokens.weight"][ids.clamp(min=0)].clone()
        if beacon.any():
            x[beacon] = w["model.beacon_embed_tokens.weight"][0]
        total = before + len(row)
        cos, sin = self.rotary(x, torch.arange(total)[None])
        mask = torch.ones(len(row), total, dtype=torch.bool).tril(before)
        new_keys, new_values = [], []
        for index in range(c["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            h = self._norm(x, w[f"{layer}.input_layernorm.weight"])
            q, k, v = (self._project(h, f"{layer}.self_attn", name, beacon, dim) for name in "qkv")
            all_k = k if keys is None else torch.cat([keys[index], k], dim=1)
            all_v = v if values is None else torch.cat([values[index], v], dim=1)
            new_keys.append(all_k)
            new_values.append(all_v)
            rotated = self._turn(all_k, cos[0], sin[0]).repeat_interleave(heads // kv_heads, dim=0)
            q = self._turn(q, cos[0, before:], sin[0, before:])
            scores = (q @ rotated.mT * dim**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
            out = (scores @ all_v.repeat_interleave(heads // kv_heads, dim=0)).transpose(0, 1).flatten(1)
            x = x + out @ w[f"{layer}.self_attn.o_proj.weight"].T
            h = self._norm(x, w[f"{layer}.post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(h @ w[f"{layer}.mlp.gate_proj.weight"].T)
            x = x + (gate * (h @ w[f"{layer}.mlp.up_proj.weight"].T)) @ w[f"{layer}.mlp.down_proj.weight"].T
        stay = torch.ones(total, dtype=torch.bool)
        if keep == "beacons":
            stay[before:] = beacon
        hidden = self._norm(x, w["model.norm.weight"])
        return hidden, torch.stack(new_keys)[:, :, stay], torch.stack(new_values)[:, :, stay]

    def _project(self, h: Tensor, attention: str, name: str, beacon: Tensor, dim: int) -> Tensor:
        results = []
        for prefix in ("", "beacon_"):
            weight = self.weights.get(f"{attention}.{prefix}{name}_proj.weight")
            if weight is None:
                continue
            bias = self.weights.get(f"{attention}.{prefix}{name}_proj.bias", torch.zeros(len(weight)))
            results.append(h @ weight.T + bias)
        chosen = torch.where(beacon[:, None], results[-1], results[0])
        return chosen.unflatten(-1, (-1, dim)).transpose(0, 1)

    @staticmethod
    def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    @staticmethod
    def _norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
