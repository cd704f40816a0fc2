"""Settings of one training run, read from one YAML file."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from cluster.config import Settings
from cluster.errors import MessageError


class TrainingError(MessageError, ValueError):
    """A run that cannot be started or continued; the message says what to change."""


class TokenizerConfig(Settings):
    """The tokenizer of a fresh model, made from texts."""

    vocabulary: int = Field(1024, ge=300, description="bytes, merges and special tokens; phrases come on top")
    files: tuple[str, ...] = Field((), description="text or JSON Lines files to learn the merges from")
    generator: str | None = Field(None, description="module:function that yields texts to learn the merges from")
    phrases: tuple[str, ...] = Field((), description="strings that become one token each, beside the memory prompts'")


class FreshConfig(Settings):
    """A new model of Qwen2 shape, drawn from the run's seed."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    layers: int = Field(4, ge=1, description="decoder layers")
    hidden: int = Field(256, ge=8, description="width of the residual stream")
    heads: int = Field(8, ge=1, description="query heads")
    kv_heads: int = Field(8, ge=1, description="key and value heads")
    head_dim: int = Field(32, ge=4, description="width of a head")
    mlp: int = Field(768, ge=8, description="width of the MLP")
    window: int = Field(64, ge=2, description="tokens compressed together")
    ratios: tuple[int, ...] = Field((2, 4, 8), description="ratios that the checkpoint names as its own")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: dict[str, str | int | float] = Field(
        {},
        description="of the rotary frequencies, as in config.json; llama3 with a large factor leaves only the fast "
        "ones turning: near places are told apart, and far content is found as well at any distance",
    )
    max_positions: int = Field(32768, ge=1, description="longest sequence that the config promises")
    knows: str | None = Field(None, description="the one kind of text it is taught, which its config then says")
    tied: bool = Field(True, description="whether the embedding is also the output matrix")
    local_heads: bool = Field(
        True, description="begin layer 0 with heads that look 1, 2, 3, … tokens back: copying is learnt much sooner"
    )


class LoraConfig(Settings):
    """Adapters, where a run trains those alone."""

    rank: int = Field(16, ge=1, description="width of an adapter")
    scale: float = Field(2.0, gt=0, description="of what an adapter adds; peft's lora_alpha is this times the rank")


class DataConfig(Settings):
    """One source of examples."""

    kind: Literal["text", "documents", "conversations"] = Field(
        description="text: next tokens; documents: questions on documents, with answers; conversations: the replies, "
        "of several that begin alike (`shared`) on one reading"
    )
    files: tuple[str, ...] = Field((), description="text, .jsonl, .jsonl.xz files; relative to the YAML file")
    generator: str | None = Field(
        None, description="module:function(seed, count, **arguments) that makes `count` documents, instead of files"
    )
    arguments: dict[str, Any] = Field({}, description="further arguments of the generator")
    share: float = Field(1.0, gt=0, description="how often it is drawn, against the stage's other sources")
    tasks: dict[Literal["span", "question", "draft", "answer", "recite", "key_point"], float] = Field(
        {"span": 1.0, "draft": 1.0}, description="what is asked of documents, and how often"
    )
    unknown: float = Field(
        0.0, ge=0, lt=1, description="share of questions whose evidence was not read: no clue, and that it is not said"
    )
    lead: str = Field(" ", description="before what is to be written; of a model with a chat template of its own, none")
    raw: bool = Field(False, description="keep the text uncompressed, as the generator reads passages")


class StageConfig(Settings):
    """One stage of a run: what is read, how long, how it is compressed."""

    name: str = Field(description="its name in progress and in the loss curve")
    data: tuple[DataConfig, ...] = Field(min_length=1, description="sources of examples")
    steps: int = Field(ge=1, description="optimiser steps at most")
    until_accuracy: float | None = Field(
        None, gt=0, le=1, description="share of target tokens predicted right, smoothed, that ends the stage early"
    )
    texts: int = Field(8, ge=1, description="texts in one step on one worker")
    accumulate: int = Field(1, ge=1, description="passes whose gradients make one step")
    tokens: int = Field(1024, ge=1, description="tokens of a text at most")
    least_tokens: int | None = Field(None, ge=1, description="texts are cut to a length drawn from here to `tokens`")
    questions: int = Field(8, ge=1, description="questions asked of each text, drawn independently")
    window: int | None = Field(None, ge=1, description="tokens compressed together; none takes the checkpoint's")
    ratios: tuple[int, ...] = Field((4,), min_length=1, description="ratios to draw each window's from; 0 keeps it raw")
    text_loss: float = Field(0.0, ge=0, description="weight of predicting the text's own tokens, beside answers")
    learning_rate: float = Field(1e-3, gt=0, description="at its highest")
    warmup_steps: int = Field(100, ge=0, description="steps over which the learning rate rises")
    final_rate: float = Field(0.1, ge=0, le=1, description="share of the learning rate that is left at the end")
    grow: dict[Literal["layers", "hidden", "heads", "kv_heads", "mlp"], int] = Field(
        {}, description="sizes to grow the model to before the stage, keeping what it computes"
    )


class RunConfig(Settings):
    """A whole training run."""

    output: str = Field(description="folder for checkpoints, progress and the result; relative to the YAML file")
    model: str | None = Field(
        None, description="checkpoint to begin from: folder, hub name, or `smollm2`; none makes a fresh one"
    )
    fresh: FreshConfig = FreshConfig()
    parameters: Literal["beacons", "all", "lora"] = Field(
        "all", description="what is trained; lora: adapters on all matrices, merged in the end"
    )
    lora: LoraConfig = LoraConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="in order")
    seed: int = Field(0, description="of weights, data and ratios")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast, weights in float32")
    checkpoint_layers: bool = Field(False, description="recompute activations in the backward pass, to save memory")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for matrices, AdamW for the rest; sooner there from nothing, on one worker"
    )
    weight_decay: float = Field(0.01, ge=0, description="of matrices")
    betas: tuple[float, float] = Field((0.9, 0.98), description="of AdamW")
    clip: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    save_every_s: float = Field(60.0, gt=0, description="seconds between checkpoints")
    log_every: int = Field(50, ge=1, description="steps between lines of progress")
    workers: int = Field(1, ge=1, description="Ray Train workers; with GPUs, one GPU each")
    gpus: bool = Field(False, description="train on GPUs; the weights are sharded over them (FSDP)")
    threads: int = Field(0, ge=0, description="torch threads of a worker on the CPU; 0 takes torch's default")

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("two stages have the same name: rename one")
        if self.optimizer == "muon" and self.workers > 1:
            raise ValueError("muon needs whole matrices, and several workers shard them: use adamw, or one worker")
        if self.parameters == "lora" and any(stage.grow for stage in self.stages):
            raise ValueError("adapters do not grow a model: remove `grow`, or set parameters: all")
        return self


def load_run(path: str | Path) -> RunConfig:
    """Reads a run's YAML; paths in it become absolute. Raises `TrainingError` naming the key that is wrong."""
    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise TrainingError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise TrainingError(f"{file} holds no settings: see docs/training.md for an example")
    try:
        run = RunConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise TrainingError(f"{file}: {key}: {first['msg']}{_nearest(first)}") from None
    return _make_absolute(run, file.resolve().parent)


def _nearest(error: Any) -> str:
    if error["type"] != "extra_forbidden":
        return ""
    known = {
        name
        for branch in (RunConfig, StageConfig, DataConfig, LoraConfig, FreshConfig, TokenizerConfig)
        for name in branch.model_fields
    }
    near = difflib.get_close_matches(str(error["loc"][-1]), sorted(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _make_absolute(run: RunConfig, folder: Path) -> RunConfig:
    def place(name: str) -> str:
        return str((folder / Path(name).expanduser()).resolve())

    def move(data: DataConfig) -> DataConfig:
        return data.model_copy(update={"files": tuple(map(place, data.files))})

    stages = tuple(stage.model_copy(update={"data": tuple(map(move, stage.data))}) for stage in run.stages)
    tokenizer = run.fresh.tokenizer.model_copy(update={"files": tuple(map(place, run.fresh.tokenizer.files))})
    changes: dict[str, Any] = {
        "output": place(run.output),
        "stages": stages,
        "fresh": run.fresh.model_copy(update={"tokenizer": tokenizer}),
    }
    if run.model and (folder / run.model).is_dir():
        changes["model"] = place(run.model)
    return run.model_copy(update=changes)
