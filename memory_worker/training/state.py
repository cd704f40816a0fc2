"""What a run keeps on disk: checkpoints to resume from, its progress, and the checkpoint that results.

    <output>/checkpoints/<steps>/   config.json, tokenizer, model.safetensors, optimizer.safetensors, state.json
    <output>/progress.jsonl         one line every few steps
    <output>/loss.svg               the same as a picture
    <output>/stages/<name>/         the model at the end of each stage
    <output>/adapter/               what a run of adapters trained, as peft keeps it
    <output>/model/                 the result: a checkpoint that `BeaconModel`, transformers and vLLM read

A checkpoint appears under its name when it is whole; the one before it is removed after that. That of a run of adapters
holds their weights alone.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from memory_worker.models.beacon.checkpoint import Shape, read_config
from memory_worker.training.config import TrainingError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json")  # fmt: skip


@dataclass
class State:
    """How far a run is. Sums are over the steps since the last line of progress."""

    stage: int = 0
    step: int = 0  # of this stage
    total_steps: int = 0
    tokens: int = 0  # that went through the model, on all workers
    seconds: float = 0.0  # of training, over all of the run's processes
    accuracy: float = 0.0  # share of targets predicted right, smoothed over steps
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    hit_sum: float = 0.0


class RunFolder:
    """The output folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def result(self) -> Path:
        return self.path / "model"

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        folder = self.path / "checkpoints"
        found = [entry for entry in folder.glob("*") if entry.name.isdigit()] if folder.is_dir() else []
        return max(found, key=lambda entry: int(entry.name), default=None)

    def load(self, checkpoint: Path) -> tuple[State, dict[str, Tensor]]:
        """State and the optimiser's tensors, by `<parameter>/<moment>`. Raises `TrainingError` if unreadable."""
        from safetensors.torch import load_file

        try:
            state = State(**json.loads((checkpoint / "state.json").read_text("utf-8")))
            return state, load_file(checkpoint / "optimizer.safetensors")
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(f"{checkpoint} cannot be read ({error}); remove it to begin again") from None

    def save(
        self, state: State, config: Mapping[str, Any], weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> Path:
        """Writes a checkpoint, and removes those before it."""
        from safetensors.torch import save_file

        folder = self.path / "checkpoints"
        target, building = folder / str(state.total_steps), folder / f".{state.total_steps}"
        shutil.rmtree(building, ignore_errors=True)
        write_model(building, config, weights, self.path / "tokenizer")
        save_file(dict(optimizer), building / "optimizer.safetensors")
        (building / "state.json").write_text(json.dumps(asdict(state)), "utf-8")
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
        for entry in folder.iterdir():
            if entry != target:
                shutil.rmtree(entry)
        return target

    def report(self, line: Mapping[str, Any]) -> None:
        """Appends a line of progress."""
        with (self.path / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def progress(self, until_step: int | None = None) -> list[dict[str, Any]]:
        """The lines so far; with `until_step`, later ones are removed: a resumed run writes them again."""
        file = self.path / "progress.jsonl"
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
        if until_step is not None:
            lines = [line for line in lines if line["total_steps"] <= until_step]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return lines


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    listed = {"model.safetensors"}
    if index.is_file():
        listed = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return {name: tensor for file in sorted(listed) for name, tensor in load_file(folder / file).items()}


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], tokenizer: Path) -> None:
    """A checkpoint in Hugging Face layout, whole or not at all."""
    from safetensors.torch import save_file

    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    (building / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", "utf-8")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, building / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    copy_tokenizer(tokenizer, building)
    if folder.exists():
        shutil.rmtree(folder)
    building.rename(folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files that make a checkpoint's tokenizer and prompts, those that there are."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def load_beginning(folder: Path, *, beacons: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and float32 weights of the checkpoint a run begins from; where `beacons` lack, they are copied.

    Raises `UnsupportedCheckpoint` if it is none that a memory model can be trained from.
    """
    shape = Shape.of(folder)
    config = read_config(folder)
    weights = {name: tensor.float() for name, tensor in read_weights(folder).items()}
    if beacons and not any("beacon" in name for name in weights):
        for name in [name for name in weights if any(f".{part}_proj." in name for part in "qkv")]:
            stem, _, part = name.rpartition("self_attn.")
            weights[f"{stem}self_attn.beacon_{part}"] = weights[name].clone()
        embedding = weights["model.embed_tokens.weight"]
        if shape.eos is None:
            raise TrainingError(f"{folder} names no eos_token_id, from which its beacon embedding could begin: add it")
        weights["model.beacon_embed_tokens.weight"] = embedding[shape.eos : shape.eos + 1].clone()
    if config.setdefault("tie_word_embeddings", "lm_head.weight" not in weights):
        weights.pop("lm_head.weight", None)  # a copy of the embedding
    config.setdefault("head_dim", shape.head_dim)
    if beacons:
        config.setdefault("beacon_window", shape.window)
    return config, weights
