"""`memorag evaluate`: questions with known answers, by several methods, scored and compared."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.options import with_output
from serving.cli.show import Output

if TYPE_CHECKING:
    from serving.evaluation.datasets import Example
    from serving.evaluation.methods import Method
    from serving.evaluation.run import Run


@with_output
def evaluate(
    out: Output,
    dataset: Annotated[
        Path,
        typer.Argument(
            exists=True, help="File or folder: LongBench, LongBench v2, InfiniteBench, UltraDomain, L-Eval, or spans."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="Folder for rows and report, taken up if it is there; otherwise DATASET's name + '-eval'.",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Of memorag, rag, hyde, rewrite, memory, full, passages; separated by commas.")
    ] = "memorag,rag",
    profile: Annotated[str, typer.Option(help="Of the server that is started: a name, or a YAML file.")] = "embedded",
    url: Annotated[str | None, typer.Option(help="A server that runs already, instead.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Only this part of the dataset; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions at most, evenly spread.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 128,
    cited: Annotated[
        bool, typer.Option("--cited", help="Ask for answers as users get them, and score them without their citations.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Questions in flight; above 1, batches may change an answer's last bits.")
    ] = 1,
) -> None:
    """Measure quality: answers, recall, latency and tokens of each method, with confidence intervals.

    Killed, it goes on where it stopped: give the same command again.
    """
    with out.interruptible("interrupted; give the same command to go on"):
        from serving.batch.progress import counting
        from serving.client.client import MemoRAG
        from serving.config import load_profile
        from serving.deploy.daemon import ServerOptions, borrowed
        from serving.evaluation.datasets import read_examples
        from serving.evaluation.evaluate import ask_all, sample
        from serving.evaluation.run import Run, fingerprint

        methods = _methods(tasks)
        examples = sample(read_examples(dataset, part or ()), limit)
        settings: dict[str, Any] = {"questions": fingerprint(examples), "max_tokens": max_tokens, "cited": cited}
        settings |= {"url": url} if url else {"profile": load_profile(profile).model_dump(mode="json")}
        run = Run(output or Path(f"{dataset.name.split('.')[0]}-eval"), settings)
        if any(run.lacks(example, method) for example in examples for method in methods):
            with ExitStack() as stack:
                if not url:
                    wait = stack.enter_context(out.waiting("starting the server"))
                    own = ServerOptions(profile, str(run.storage), port=0)
                    url = str(stack.enter_context(borrowed(own, on_wait=wait)).address)
                client = stack.enter_context(MemoRAG(url, os.environ.get("MEMORAG_API_KEY")))
                show = stack.enter_context(counting("asking", "answers", True))
                ask_all(
                    client, run, examples, methods,
                    max_tokens=max_tokens, concurrency=concurrency, cited=cited, show=show,
                )  # fmt: skip
        shutil.rmtree(run.storage, ignore_errors=True)
        _report(out, run, dataset, examples, methods)


def _methods(tasks: str) -> "list[Method]":
    from serving.evaluation.methods import METHODS

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METHODS] or not names:
        raise typer.BadParameter(f"--tasks: {unknown or 'nothing'} is not among {', '.join(METHODS)}")
    return [method for method in METHODS if method in names]


def _report(out: Output, run: "Run", dataset: Path, examples: "Sequence[Example]", methods: "Sequence[Method]") -> None:
    import json

    from serving.evaluation.report import report, report_svg

    found = {"dataset": dataset.name} | report(examples, run.rows, methods)
    whole = list(found["parts"])[-1]
    (run.folder / "report.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    picture = report_svg(f"{dataset.name}: {len(examples)} questions", found["parts"][whole])
    (run.folder / "report.svg").write_text(picture, encoding="utf-8")
    if out.as_json:
        out.result(found, "")
        return
    for part in found["parts"]:
        out.table(f"{dataset.name}: {part}", _rows(found, part))
    out.table("cost", [{"method": name} | _costs(costs) for name, costs in found["methods"].items()])
    for name, costs in found["methods"].items():
        for error in costs["errors"]:
            out.note(f"{name} failed: {error}")
        for note, count in costs["notes"].items():
            out.note(f"{name}: {count} of {costs['asked']} answers say {note}")
    out.note(f"rows, report.json and report.svg are in {run.folder}")


def _rows(found: Mapping[str, Any], part: str) -> list[dict[str, str]]:
    """A row for each figure and method, with what it has more than the baseline."""
    rows, more = [], found["differences"][part]
    for figure, values in found["parts"][part].items():
        for method, value in values.items():
            row = {"figure": figure, "method": method, "n": str(value["n"])}
            row |= {"mean": f"{value['mean']:.3f}", "95 %": _between(value, "")}
            gain = more.get(figure, {}).get(method)
            row |= {
                f"over {found['baseline']}": f"{gain['mean']:+.3f}" if gain else "",
                "95 % of it": _between(gain, "+") if gain else "",
            }
            rows.append(row)
    return rows


def _between(value: Mapping[str, Any], sign: str) -> str:
    return "" if value["low"] is None else f"{value['low']:{sign}.3f} to {value['high']:{sign}.3f}"


def _costs(costs: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: "" if costs[name] is None else f"{costs[name]:,.{digits}f}"
        for name, digits in (("asked", 0), ("failed", 0), ("clues", 1), ("ms_median", 0), ("ms_p95", 0), ("tokens", 0))
    }
