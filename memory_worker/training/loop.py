"""The training loop of one worker. Alone it trains on one device; several shard the model between them.

What a step does depends on the run's settings, the step's number and the weights, and on nothing else: a run that
is resumed from a checkpoint goes on bit for bit as if it had not been interrupted (on one kind of device).
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import MessageError
from memory_worker.models import smollm2
from memory_worker.models.beacon.checkpoint import resolve
from memory_worker.training.config import RunConfig, StageConfig
from memory_worker.training.curve import write_curve
from memory_worker.training.data import Source, batches
from memory_worker.training.fresh import fresh_config, fresh_model, write_fresh_tokenizer
from memory_worker.training.grow import grow
from memory_worker.training.lora import add_adapters, merge_adapters, split_adapters, write_adapters
from memory_worker.training.model import BEACON_MARK, TrainedModel
from memory_worker.training.optimizer import Optimizer, gather_whole
from memory_worker.training.state import RunFolder, State, copy_tokenizer, load_beginning, read_weights, write_model

_SMOOTHING = 0.98  # of the accuracy that ends a stage: about 50 steps
_CURVE_EVERY_S = 60.0


class Stopped(MessageError):
    """The run was asked to stop; its last step is in a checkpoint."""


class Loop:
    """One worker's part in a run. `rank` of `ranks` workers; a process group is there if there are several."""

    def __init__(
        self,
        run: RunConfig,
        *,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
        on_progress: Callable[[Mapping[str, Any]], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run = run
        self.rank, self.ranks = rank, ranks
        self.device = torch.device(device)
        self.folder = RunFolder(run.output)
        self._on_progress = on_progress or (lambda line: None)
        self._stop = stop
        self._saved_at = self._drawn_at = 0.0

    def train(self) -> Path:
        """Trains from the latest checkpoint, or from the beginning, to the end; returns the result's folder.

        Raises `TrainingError` for settings or files that cannot be used, `Stopped` when it was asked to stop.
        """
        if self.run.threads:
            torch.set_num_threads(self.run.threads)
        latest = self.folder.latest()
        if self.rank == 0:
            self._prepare(latest)
        self._wait()
        state, moments = self.folder.load(latest) if latest else (State(), {})
        if latest and not self._adapts:
            config, weights = load_beginning(latest)
        else:
            config, weights = self._begin()
            weights |= read_weights(latest) if latest else {}
        if self.rank == 0:
            self.folder.progress(state.total_steps)
        self._wait()
        tokenizer = _tokenizer(self.folder.path / "tokenizer")
        while state.stage < len(self.run.stages):
            stage = self.run.stages[state.stage]
            if stage.grow and state.step == 0:
                config, weights = grow(config, weights, stage.grow, self.run.seed)
            model = TrainedModel(config, beacons=any(BEACON_MARK in name for name in weights))
            if self._adapts:
                add_adapters(model, self.run.lora, self.run.seed)
            # What a run has not trained yet, its adapters, begins as it was drawn.
            model.load_state_dict(model.state_dict() | weights)
            weights = self._stage(model, tokenizer, stage, state, moments)
            moments = {}
            state.stage, state.step = state.stage + 1, 0
            state.accuracy = state.loss_sum = state.weight_sum = state.hit_sum = 0.0
            if self.rank == 0:
                self.folder.save(state, config, self._trained(weights), {})
                self._write(self.folder.path / "stages" / stage.name, config, weights)
        if self.rank == 0:
            self._write(self.folder.result, config, weights)
            if self._adapts:
                write_adapters(self.folder.path / "adapter", self._trained(weights), self.run.lora, str(self.run.model))
            write_curve(self.folder.path / "loss.svg", self.folder.progress())
        self._wait()
        return self.folder.result

    def _prepare(self, latest: Path | None) -> None:
        """The folder and the tokenizer, once, before any worker reads them."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        tokenizer = self.folder.path / "tokenizer"
        if self.run.model:
            copy_tokenizer(_find_model(self.run.model), tokenizer)
        elif not (tokenizer / "tokenizer_config.json").is_file():
            write_fresh_tokenizer(tokenizer, self.run.fresh.tokenizer)

    def _begin(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.run.model:
            return load_beginning(_find_model(self.run.model), beacons=not self._adapts)
        config = fresh_config(self.run.fresh, len(_tokenizer(self.folder.path / "tokenizer")))
        model = fresh_model(config, self.run.seed, local_heads=self.run.fresh.local_heads)
        return config, model.state_dict()

    def _stage(
        self, model: TrainedModel, tokenizer: Any, stage: StageConfig, state: State, moments: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Trains one stage from `state.step` on; returns all weights."""
        config = model.config
        window = stage.window or config.get("beacon_window") or stage.tokens
        sources = [Source(data, tokenizer) for data in stage.data]
        model.checkpoint_layers = self.run.checkpoint_layers
        if not self._adapts:
            for name, parameter in model.named_parameters():
                parameter.requires_grad = self.run.parameters == "all" or BEACON_MARK in name
        elif self.run.precision == "bfloat16" and self.ranks == 1:  # several shard each layer as one dtype
            for parameter in model.model.layers.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
        model = self._shard(model.to(self.device))
        optimizer = Optimizer(model, self.run)
        optimizer.restore(moments)
        self._saved_at = time.monotonic()
        while state.step < stage.steps and not _has_reached(stage, state):
            begun = time.monotonic()
            self._step(model, optimizer, sources, stage, window, state)
            state.step += 1
            state.total_steps += 1
            state.seconds += time.monotonic() - begun
            if state.total_steps % self.run.log_every == 0:
                self._report(stage, state)
            stopping = self._agree(self._stop())
            if stopping or self._agree(time.monotonic() - self._saved_at > self.run.save_every_s):
                weights, held = _gather(model), optimizer.moments()
                if self.rank == 0:
                    self.folder.save(state, config, self._trained(weights), held)
                self._wait()
                self._saved_at = time.monotonic()
            if stopping:
                raise Stopped(f"stopped after step {state.total_steps}; the same command goes on from there")
        return _gather(model)

    def _step(
        self,
        model: TrainedModel,
        optimizer: Optimizer,
        sources: list[Source],
        stage: StageConfig,
        window: int,
        state: State,
    ) -> None:
        sums = torch.zeros(4, dtype=torch.float64)  # loss, weight, hits, tokens
        parts = [*batches(sources, stage, window, self.run.seed, state.total_steps, self.rank, self.ranks)]
        weight = torch.stack([part.weight for part in parts]).sum().double()
        if self.ranks > 1:
            dist.all_reduce(weight)
        scale = self.ranks / float(weight)  # gradients are averaged over ranks; a target counts alike on each
        for part in parts:
            half = self.run.precision == "bfloat16"
            with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
                loss, counted, hits = model(part.to(self.device))
            (loss * scale).backward()
            sums += torch.tensor([float(loss.detach()), float(counted), float(hits), part.token_count])
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.run.clip)
        optimizer.step(_rate(stage, state.step))
        if self.ranks > 1:
            dist.all_reduce(sums)
        state.loss_sum += float(sums[0])
        state.weight_sum += float(sums[1])
        state.hit_sum += float(sums[2])
        state.tokens += int(sums[3])
        share = float(sums[2] / sums[1])
        state.accuracy = share if state.step == 0 else _SMOOTHING * state.accuracy + (1 - _SMOOTHING) * share

    @property
    def _adapts(self) -> bool:
        return self.run.parameters == "lora"

    def _trained(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds of all weights."""
        return split_adapters(weights)[1] if self._adapts else dict(weights)

    def _write(self, folder: Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
        """A plain checkpoint: adapters merged, in the dtype of that which they were trained on."""
        if self._adapts:
            own, adapters = split_adapters(weights)
            dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
            weights = {n: t.to(dtype) for n, t in merge_adapters(own, adapters, self.run.lora.scale).items()}
        write_model(folder, config, weights, self.folder.path / "tokenizer")

    def _shard(self, model: TrainedModel) -> TrainedModel:
        if self.ranks == 1:
            return model
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model

    def _report(self, stage: StageConfig, state: State) -> None:
        line = {
            "stage": stage.name,
            "step": state.step,
            "total_steps": state.total_steps,
            "loss": state.loss_sum / state.weight_sum,
            "accuracy": state.hit_sum / state.weight_sum,
            "learning_rate": _rate(stage, state.step),
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
        }
        state.loss_sum = state.weight_sum = state.hit_sum = 0.0
        if self.rank == 0:
            self.folder.report(line)
            if time.monotonic() - self._drawn_at > _CURVE_EVERY_S:
                self._drawn_at = time.monotonic()
                write_curve(self.folder.path / "loss.svg", self.folder.progress())
        self._on_progress(line)

    def _agree(self, mine: bool) -> bool:
        """Whether it is so on the first worker."""
        if self.ranks == 1:
            return mine
        told = torch.tensor([mine], dtype=torch.int32, device=self.device)
        dist.broadcast(told, 0)
        return bool(told.item())

    def _wait(self) -> None:
        if self.ranks > 1:
            dist.barrier()


def _rate(stage: StageConfig, step: int) -> float:
    """Rises over the warm-up, then falls along a line."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * (1 - (1 - stage.final_rate) * min(1.0, done))


def _has_reached(stage: StageConfig, state: State) -> bool:
    return stage.until_accuracy is not None and state.step > 50 and state.accuracy >= stage.until_accuracy


def _gather(model: TrainedModel) -> dict[str, Tensor]:
    """All weights, whole and on the CPU. With several ranks, every one calls."""
    return {name: gather_whole(parameter) for name, parameter in model.named_parameters()}


def _find_model(name: str) -> Path:
    return smollm2.prepare_smollm2() if name == smollm2.NAME else resolve(name)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
