"""A run on Ray Train: one `Loop` a worker, restarted from the latest checkpoint when a worker is lost."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory_worker.training.config import RunConfig, TrainingError

_RESTARTS = 3
_LOOK_EVERY_S = 1.0


def train_on_ray(run: RunConfig, on_progress: Callable[[Mapping[str, Any]], None] | None = None) -> Path:
    """Trains with `run.workers` Ray Train workers; returns the result's folder, `<output>/model`.

    Ray must be there. `run.output` must be a folder that this process and every worker's node see. Raises
    `TrainingError`, with the worker's error in it, when the run cannot go on.
    """
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRun
    from ray.train.torch import TorchConfig, TorchTrainer

    output = Path(run.output)
    output.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"run": run.model_dump_json()},
        torch_config=TorchConfig(backend="nccl" if run.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=run.workers, use_gpu=run.gpus),
        run_config=RayRun(
            name=output.name,
            storage_path=str(output / "ray"),
            failure_config=FailureConfig(max_failures=_RESTARTS),
        ),
    )
    with _followed(output / "progress.jsonl", on_progress):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise TrainingError(str(error)) from error
    return output / "model"


def train_worker(config: Mapping[str, str]) -> None:
    """What each Ray Train worker runs."""
    from ray import train
    from ray.train.torch import get_device

    from memory_worker.training.loop import Loop

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = train.get_context()
    loop = Loop(
        RunConfig.model_validate_json(config["run"]),
        rank=context.get_world_rank(),
        ranks=context.get_world_size(),
        device=get_device(),
        on_progress=lambda line: train.report(dict(line)),
    )
    loop.train()


@contextmanager
def _followed(file: Path, on_progress: Callable[[Mapping[str, Any]], None] | None) -> Iterator[None]:
    """Hands on what is written to `file` while the block runs: Ray's own callbacks run in another process."""
    done = threading.Event()
    shown = len(file.read_text("utf-8").splitlines()) if file.is_file() else 0

    def look() -> None:
        nonlocal shown
        while not done.wait(_LOOK_EVERY_S):
            show()
        show()

    def show() -> None:
        nonlocal shown
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        for line in lines[shown:]:
            if on_progress:
                on_progress(json.loads(line))
        shown = len(lines)

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
