"""Low-rank adapters (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685): every matrix of a model learns in few numbers.

What is trained is merged into the matrices in the end: engines get a plain checkpoint and never see an adapter.
Adapters are also kept as such, in files that peft reads.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from memory_worker.models.beacon.checkpoint import read_config
from memory_worker.training.config import LoraConfig, TrainingError
from memory_worker.training.state import read_weights, write_model

LORA_MARK = ".lora_"  # in the names of the weights that adapters have and checkpoints do not
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DOWN, _UP = f"{LORA_MARK}down", f"{LORA_MARK}up"
_PEFT = "base_model.model."
_PEFT_NAMES = {_DOWN: ".lora_A.weight", _UP: ".lora_B.weight"}


class LoraLinear(nn.Linear):
    """A frozen matrix and, added to it, `scale` times the product of two narrow ones that are trained."""

    def __init__(self, linear: nn.Linear, lora: LoraConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = lora.scale
        self.lora_down = nn.Parameter(torch.empty(lora.rank, linear.in_features))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, lora.rank))  # so that it begins as it was

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + F.linear(F.linear(rows, self.lora_down), self.scale * self.lora_up)


def add_adapters(model: nn.Module, lora: LoraConfig, seed: int) -> None:
    """Puts an adapter on every matrix of the decoder layers but those of beacons, and freezes all else."""
    draw = torch.Generator().manual_seed(seed)
    for module in [*model.modules()]:
        for name, linear in [*module.named_children()]:
            if name in _MATRICES and isinstance(linear, nn.Linear):
                adapted = LoraLinear(linear, lora)
                nn.init.normal_(adapted.lora_down, std=1 / math.sqrt(linear.in_features), generator=draw)
                setattr(module, name, adapted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = LORA_MARK in name


def split_adapters(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the checkpoint, and those of its adapters."""
    own = {name: tensor for name, tensor in weights.items() if LORA_MARK not in name}
    return own, {name: tensor for name, tensor in weights.items() if LORA_MARK in name}


def merge_adapters(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights with the adapters' products added, each in the dtype that it has."""
    merged = dict(weights)
    for name in adapters:
        matrix, mark, _ = name.partition(_DOWN)
        if mark:
            product = adapters[f"{matrix}{_UP}"].float() @ adapters[name].float()
            whole = merged[f"{matrix}.weight"]
            merged[f"{matrix}.weight"] = (whole.float() + scale * product).to(whole.dtype)
    return merged


def write_adapters(folder: Path, adapters: Mapping[str, Tensor], lora: LoraConfig, base: str) -> None:
    """Adapters in bfloat16, in peft's files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_MATRICES),
    }
    tensors = {}
    for name, tensor in adapters.items():
        mark = _DOWN if name.endswith(_DOWN) else _UP
        tensors[f"{_PEFT}{name.removesuffix(mark)}{_PEFT_NAMES[mark]}"] = tensor.bfloat16().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def read_adapters(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Adapters that `write_adapters` or peft wrote, and their scale. Raises `TrainingError` where they are no such."""
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{folder} holds no LoRA adapter ({error}): name the `adapter` of a run, or peft's"
        ) from None
    adapters = {}
    for name, tensor in tensors.items():
        mark = next((mark for mark, theirs in _PEFT_NAMES.items() if name.endswith(theirs)), None)
        if mark is None:
            raise TrainingError(f"{folder} adapts {name}, which is no plain LoRA of a matrix: merge it with peft")
        adapters[f"{name.removeprefix(_PEFT).removesuffix(_PEFT_NAMES[mark])}{mark}"] = tensor
    return adapters, scale


def merge(model: Path, adapter: Path, output: Path) -> None:
    """Writes the checkpoint that `model` is with the adapter merged, in its own dtype.

    Raises `TrainingError` where the adapter is of another model's shape, or `output` exists already.
    """
    if output.exists():
        raise TrainingError(f"{output} exists already, and nothing is written over: name another folder, or remove it")
    adapters, scale = read_adapters(adapter)
    weights = read_weights(model)
    for name, tensor in adapters.items():
        matrix, mark, _ = name.partition(_DOWN)
        if mark and (
            f"{matrix}.weight" not in weights
            or weights[f"{matrix}.weight"].shape != (len(adapters[f"{matrix}{_UP}"]), tensor.shape[1])
        ):
            raise TrainingError(
                f"{model} has no matrix {matrix} of the adapter's shape: it was trained on another model"
            )
    write_model(output, read_config(model), merge_adapters(weights, adapters, scale), model)
