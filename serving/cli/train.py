"""`memorag train`: train a memory model from one YAML file, prepare documents for it, average what came of runs."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serving.cli.options import with_output
from serving.cli.show import Commands, Output

if TYPE_CHECKING:
    from memory_worker.training import RunConfig


class _RunFirst(Commands):
    """`memorag train RUN.yaml` is `memorag train run RUN.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunFirst,
    help="Train a memory model: memorag train RUN.yaml. See docs/training.md.",
    no_args_is_help=True,
)


@app.command()
@with_output
def run(
    out: Output,
    file: Annotated[Path, typer.Argument(metavar="RUN.yaml", exists=True, dir_okay=False, help="The run's settings.")],
    ray: Annotated[
        str | None,
        typer.Option(help="Ray cluster to train on; none starts one on this machine.", envvar="RAY_ADDRESS"),
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Without Ray, in this process: one worker, stops cleanly on SIGTERM.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of this run, instead of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of this run, instead of the file's.")] = None,
) -> None:
    """Train, or go on where the run was stopped; return when its last stage is done, with the checkpoint's folder."""
    from memory_worker.training import load_run

    settings = load_run(file)
    if output is not None:
        settings = settings.model_copy(update={"output": str(output.absolute())})
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed})

    def show(line: Mapping[str, Any]) -> None:
        out.note(
            f"{line['stage']} step {line['step']:,}  loss {line['loss']:.3f}  right {line['accuracy']:.1%}  "
            f"{line['tokens'] / 1e6:.2f} M tokens  {line['tokens'] / max(line['seconds'], 1e-9):,.0f} tokens/s"
        )

    result = _here(settings, show, out) if in_process else _on_ray(settings, ray, show)
    out.result({"model": str(result), "curve": str(Path(settings.output) / "loss.svg")}, str(result))


@app.command()
@with_output
def prepare(
    out: Output,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", exists=True, dir_okay=False, help="Plain text, a document each."),
    ],
    out_file: Annotated[Path, typer.Option("--out", help="JSON Lines file to write.")] = Path("tasks.jsonl"),
    language: Annotated[Literal["en", "zh"], typer.Option(help="Of the documents.")] = "en",
    most: Annotated[int, typer.Option(min=1, help="Questions on one document at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Equal seeds make equal tasks.")] = 0,
) -> None:
    """Turn documents into training tasks: cloze spans, evidence recall, surrogate questions."""
    from memory_worker.training.prepare import prepare as prepared

    documents = [
        prepared(path.read_text("utf-8"), id=path.stem, title=path.name, language=language, most=most, seed=seed)
        for path in files
    ]
    out_file.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), "utf-8")
    questions = sum(len(document["questions"]) for document in documents)
    facts = {"file": str(out_file), "documents": len(documents), "questions": questions}
    out.result(facts, f"{questions:,} questions on {len(documents):,} documents in {out_file}")


@app.command()
@with_output
def average(
    out: Output,
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", exists=True, file_okay=False, help="Results of runs from one model."),
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write the checkpoint to.")] = Path("averaged"),
) -> None:
    """Write the mean of models that were trained from one beginning with different seeds: better than each."""
    from memory_worker.training.average import average as averaged

    averaged(models, out_folder)
    out.result({"model": str(out_folder)}, str(out_folder))


@app.command()
@with_output
def merge(
    out: Output,
    model: Annotated[Path, typer.Argument(metavar="MODEL", exists=True, file_okay=False, help="It was trained on.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", exists=True, file_okay=False, help="The `adapter` of a run, or peft's.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write the checkpoint to.")] = Path("merged"),
) -> None:
    """Merge a LoRA adapter into its model: a plain checkpoint, which is what engines are given."""
    from memory_worker.training.lora import merge as merged

    merged(model, adapter, out_folder)
    out.result({"model": str(out_folder)}, str(out_folder))


def _here(settings: "RunConfig", show: Any, out: Output) -> Path:
    from memory_worker.training import TrainingError
    from memory_worker.training.loop import Loop, Stopped

    if settings.workers > 1 or settings.gpus:
        raise TrainingError("--in-process is one worker on the CPU: leave it out, or set workers: 1, gpus: false")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return Loop(settings, on_progress=show, stop=lambda: bool(asked)).train()
    except Stopped as error:
        out.note(str(error))
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_ray(settings: "RunConfig", address: str | None, show: Any) -> Path:
    from serving.config import RayConfig
    from serving.deploy.local_ray import new_ray_folder, start_ray, stop_ray

    folder = None
    if address is None:
        folder = new_ray_folder()
        start_ray(RayConfig(logical_cpus=settings.workers + 1, metrics=False), folder)
    import ray

    from memory_worker.training.ray_train import train_on_ray

    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False)
        return train_on_ray(settings, show)
    finally:
        if folder is not None:
            stop_ray(folder)
        else:
            ray.shutdown()
