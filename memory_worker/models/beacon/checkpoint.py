"""Checkpoints of the memory model in Hugging Face layout: their shape, weights and fingerprint.

One without beacon weights is a stock decoder: it makes memories of the kinds that need none. Of families other than
`FAMILIES` only the fingerprint is known here; `memory_worker.models.stock` reads them.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import MessageError
from memory_worker.models.beacon.rope import Rope, UnsupportedRope, rope_parameters

FAMILIES = ("qwen2", "qwen3", "mistral", "llama")
DEFAULT_WINDOW = 2048
_RECIPE = 1  # counts changes of how the same weights make a memory
# In a config, but nothing to what the model computes.
_INDIFFERENT = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")


class UnsupportedCheckpoint(MessageError, ValueError):
    """The checkpoint is not one of a memory model that can be run here, or it is incomplete."""


@dataclass(frozen=True)
class Shape:
    """What a checkpoint's config says that matters here."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float  # of the RMS norms
    window: int  # tokens compressed together
    ratios: tuple[int, ...]  # tokens per beacon the checkpoint was trained for; empty where it does not say
    rope: dict[str, Any]
    eos: int | None  # whose embedding training begins the beacon from

    @classmethod
    def of(cls, folder: Path) -> "Shape":
        """Reads `folder`/config.json. Raises `UnsupportedCheckpoint`."""
        config = read_config(folder)
        known = families(config)
        if not known:
            raise UnsupportedCheckpoint(
                f"{folder} holds a model of type {config.get('model_type')!r}; a beacon model is one of "
                f"{', '.join(FAMILIES)}"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedCheckpoint(f"{folder} has hidden_act {config['hidden_act']!r}; only silu is supported")
        slides = config.get("sliding_window") is not None and config.get(
            "use_sliding_window", not known <= {"qwen2", "qwen3"}
        )
        if slides:
            raise UnsupportedCheckpoint(
                f"{folder} attends over a sliding window, and would forget its memory; "
                "set sliding_window to null in its config.json if it was trained without"
            )
        rope = rope_parameters(config)
        if rope.get("partial_rotary_factor", 1) != 1:
            raise UnsupportedRope(f"{folder} rotates a part of each head; its partial_rotary_factor must be 1")
        heads = config["num_attention_heads"]
        ratios = config.get("beacon_ratio") or []
        eos = config.get("eos_token_id")
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            epsilon=config.get("rms_norm_eps", 1e-6),
            window=config.get("beacon_window") or DEFAULT_WINDOW,
            ratios=tuple(r for r in (ratios if isinstance(ratios, list) else [ratios]) if r > 0),
            rope=rope,
            eos=eos[0] if isinstance(eos, list) else eos,
        )


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; q, k, v stacked, and gate, up stacked."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor] | None  # [head_dim] of queries, of keys: RMS norms before RoPE (Qwen3)
    beacon_qkv: Tensor | None  # as qkv, for beacon rows; none in a stock checkpoint
    beacon_qkv_bias: Tensor | None
    out: Tensor  # [hidden, heads * head_dim]
    out_bias: Tensor | None
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * mlp, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, mlp]
    down_bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All weights, on one device and in one dtype."""

    embedding: Tensor  # [vocab, hidden]
    beacon: Tensor | None  # [hidden]; none in a stock checkpoint
    layers: tuple[Layer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embedding itself where they are tied


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the download of that hub name."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))


def max_positions(folder: Path) -> int | None:
    """Positions that a checkpoint was trained for; none where its config does not say."""
    config = read_config(folder)
    return config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `folder`/config.json. Raises `UnsupportedCheckpoint`."""
    file = folder / "config.json"
    if not file.is_file():
        raise UnsupportedCheckpoint(f"{folder} has no config.json: it is not a checkpoint in Hugging Face layout")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def families(config: Mapping[str, Any]) -> set[str]:
    """Those of `FAMILIES` that a checkpoint's config names: one, or none."""
    names = [str(config.get("model_type", "")), *(config.get("architectures") or [])]
    return {family for family in FAMILIES for name in names if _family(name) == family}


def load(folder: Path, shape: Shape, dtype: torch.dtype, device: torch.device) -> Weights:
    """Reads the weights of `folder`, those of beacons where there are any.

    Raises `UnsupportedCheckpoint` naming a weight that is missing.
    """
    from safetensors import safe_open

    files: list[Any] = [safe_open(file, framework="pt", device=str(device)) for file in _weight_files(folder)]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def get(name: str) -> Tensor:
        if name not in where:
            raise UnsupportedCheckpoint(f"{folder} lacks the weight {name}")
        return where[name].get_tensor(name).to(device=device, dtype=dtype)

    def stack(*names: str) -> Tensor:
        return torch.cat([get(name) for name in names])

    def stack_bias(*names: str) -> Tensor | None:
        return stack(*names) if names[0] in where else None

    has_beacons = any("beacon" in name for name in where)
    embedding = get("model.embed_tokens.weight")
    beacon = get("model.beacon_embed_tokens.weight")[0] if has_beacons else None
    layers = []
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        stock = [f"{layer}.self_attn.{p}_proj" for p in "qkv"]
        beacons = [f"{layer}.self_attn.beacon_{p}_proj" for p in "qkv"]
        norms = [f"{layer}.self_attn.{p}_norm.weight" for p in "qk"]
        mlp = [f"{layer}.mlp.{p}_proj" for p in ("gate", "up")]
        layers.append(
            Layer(
                attention_norm=get(f"{layer}.input_layernorm.weight"),
                qkv=stack(*(f"{name}.weight" for name in stock)),
                qkv_bias=stack_bias(*(f"{name}.bias" for name in stock)),
                head_norms=(get(norms[0]), get(norms[1])) if norms[0] in where else None,
                beacon_qkv=stack(*(f"{name}.weight" for name in beacons)) if has_beacons else None,
                beacon_qkv_bias=stack_bias(*(f"{name}.bias" for name in beacons)),
                out=get(f"{layer}.self_attn.o_proj.weight"),
                out_bias=stack_bias(f"{layer}.self_attn.o_proj.bias"),
                mlp_norm=get(f"{layer}.post_attention_layernorm.weight"),
                gate_up=stack(*(f"{name}.weight" for name in mlp)),
                gate_up_bias=stack_bias(*(f"{name}.bias" for name in mlp)),
                down=get(f"{layer}.mlp.down_proj.weight"),
                down_bias=stack_bias(f"{layer}.mlp.down_proj.bias"),
            )
        )
    head = get("lm_head.weight") if "lm_head.weight" in where else embedding
    return Weights(embedding, beacon, tuple(layers), get("model.norm.weight"), head)


def fingerprint(folder: Path) -> str:
    """SHA-256 of everything in the checkpoint that decides a memory: shape, window, RoPE, every weight's bytes.

    The same however the weights are spread over files. Reads all of them. Of a family that is not one of `FAMILIES` all
    of the config counts, for it is not known here what does not.
    """
    config = read_config(folder)
    facts: list[Any] = [_RECIPE, {key: value for key, value in config.items() if key not in _INDIFFERENT}]
    if families(config):
        shape = Shape.of(folder)
        facts = [_RECIPE, shape.heads, shape.kv_heads, shape.head_dim, shape.epsilon, shape.window]
        facts += [shape.rope, shape.eos]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:
        for line in sorted(line for file in _weight_files(folder) for line in _digests(file, pool)):
            digest.update(line.encode())
    return digest.hexdigest()


def rope_of(folder: Path) -> Rope:
    """The checkpoint's RoPE."""
    return Rope.from_config(read_config(folder))


def _digests(file: Path, pool: ThreadPoolExecutor) -> Iterator[str]:
    """One line for each tensor of a safetensors file: name, dtype, shape, digest."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        length = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + length])
        header.pop("__metadata__", None)

        def line(name: str) -> str:
            entry = header[name]
            start, end = entry["data_offsets"]
            with memoryview(mapped) as view, view[8 + length + start : 8 + length + end] as content:
                return f"{name} {entry['dtype']} {entry['shape']} {hashlib.sha256(content).hexdigest()}\n"

        yield from pool.map(line, header)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UnsupportedCheckpoint(f"{folder} lacks {file.name}; weights must be in safetensors files")
    return files


def _family(name: str) -> str:
    """`qwen2` of model types such as `qwen2` and `qwen2-beacon` and of the class name `Qwen2ForCausalLM`."""
    return name.lower().replace("_", "-").removesuffix("forcausallm").removesuffix("beacon").removesuffix("-")
