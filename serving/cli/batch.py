"""`memorag batch`, and `memorag memorize --recursive`: many questions, many files."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.options import STORAGE, Storage, with_output
from serving.cli.show import Output

if TYPE_CHECKING:
    from cluster.planning.costs import MemoryKind
    from serving.batch.job import BatchReport
    from serving.client.client import MemoRAG

_SHOWN_FAILURES = 20


@with_output
def batch(
    out: Output,
    questions: Annotated[
        str, typer.Argument(help="Parquet or JSON Lines: a file, a folder or a URI; columns id, memory, question.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URI for the answers, as Parquet files.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Questions in flight at most.")] = 64,
    tenant: Annotated[str, typer.Option(help="Whose memories are asked.")] = "default",
    in_order: Annotated[
        bool, typer.Option("--in-order", help="Ask in the order of the rows, not memory by memory.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what has an error in OUT.")] = False,
    rows_per_part: Annotated[int, typer.Option(min=1, help="Rows of one file in OUT.")] = 1000,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to go on asking a server that says: not now.")] = 300,
    storage: Storage = STORAGE,
    ray_address: Annotated[
        str | None, typer.Option(help="Address of the server's Ray cluster; otherwise that of --storage.")
    ] = None,
) -> None:
    """Answer every question of a file, once each. Killed, it goes on; give the same command to watch it again."""
    from serving.batch.answer import answer_all

    with out.interruptible("interrupted; the run goes on: give the same command to watch it"):
        with redirect_stdout(sys.stderr):  # where Ray has something to say
            report = answer_all(
                questions,
                output,
                concurrency=concurrency,
                tenant=tenant,
                group_by_memory=not in_order,
                retry_failed=retry_failed,
                rows_per_part=rows_per_part,
                patience_s=patience,
                storage=storage,
                ray_address=ray_address,
                progress=True,
            )
        if report.ignored:
            out.note(f"columns that are no part of a question, and were left out: {', '.join(report.ignored)}")
        out.result(report.as_json(), _summary(report, output))
        if report.state == "stopped":
            raise typer.Exit(130)


def memorize_folder(
    out: Output,
    client: "MemoRAG",
    folders: Sequence[Path],
    *,
    concurrency: int,
    tags: Sequence[str],
    kind: "MemoryKind | None",
    ratio: int | None,
) -> None:
    """`memorag memorize --recursive`: a memory of each file below a folder. Exit code 1 where one failed."""
    from serving.batch.memorize import memorize_folder as memorize
    from serving.batch.progress import counting

    if len(folders) != 1 or not folders[0].is_dir():
        raise typer.BadParameter("--recursive takes one folder, and makes a memory of each file below it")
    with counting("memorizing", "files", True) as show:
        report = memorize(client, folders[0], concurrency=concurrency, tags=tags, kind=kind, ratio=ratio, show=show)
    failures = [file for file in report.files if file.state == "failed"]
    for file in failures[:_SHOWN_FAILURES]:
        out.note(f"failed: {file.file}: {file.error}")
    if len(failures) > _SHOWN_FAILURES:
        out.note(f"and {len(failures) - _SHOWN_FAILURES:,} more; --json names all")
    if report.other:
        out.note(f"{report.other:,} files of other kinds were left out")
    line = (
        f"{report.count('made'):,} memories made, {report.count('there'):,} there before, {len(failures):,} files "
        f"failed, in {report.seconds:,.0f} s"
    )
    out.result(report.as_json(), line)
    if failures:
        raise typer.Exit(1)


def _summary(report: "BatchReport", output: str) -> str:
    done = "stopped: " if report.state == "stopped" else ""
    lines = [
        f"{done}{report.answered:,} answered, {report.failed:,} failed, {report.already:,} there before, of "
        f"{report.total:,}; {report.seconds:,.0f} s, {report.rate:.2f} questions/s",
        *(f"  {count:,} × {problem}" for problem, count in report.errors.items()),
        f"{report.parts:,} Parquet files in {output}",
    ]
    if report.state == "stopped":
        lines.append("give the same command to go on")
    return "\n".join(lines)
