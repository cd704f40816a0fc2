"""How the progress of a job is shown to people: used by the client and the command line."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

OnProgress = Callable[[Mapping[str, Any]], None]


@contextmanager
def show_progress(label: str, progress: bool | OnProgress | None) -> Iterator[OnProgress]:
    """What to call with every progress event: the caller's function, a bar on stderr, or nothing."""
    if callable(progress):
        yield progress
        return
    from rich.console import Console

    console = Console(stderr=True)
    if progress is False or (progress is None and not console.is_terminal):
        yield lambda _: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"memorizing {label}", total=None, note="")

        def show(event: Mapping[str, Any]) -> None:
            bar.update(
                task, completed=event["done_tokens"], total=event["total_tokens"] or None, note=progress_note(event)
            )

        yield show


def progress_note(event: Mapping[str, Any]) -> str:
    """A progress event in words: tokens done, speed, time left."""
    left = event.get("seconds_left")
    note = f"{event['done_tokens']:,} of {event['total_tokens']:,} tokens, {event['tokens_per_second']:,.0f} tokens/s"
    return note if left is None else f"{note}, {left:.0f} s left"
