"""How far something is, for people: a bar on a terminal, else lines, a function, or nothing. For client and batches."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

OnProgress = Callable[[Mapping[str, Any]], None]

_LINES_EVERY_S = 5.0


@contextmanager
def show_progress(label: str, progress: bool | OnProgress | None) -> Iterator[OnProgress]:
    """What to call with every progress event of a job: the caller's function, or what `draw_counts` draws it with."""
    if callable(progress):
        yield progress
        return
    with draw_counts(f"memorizing {label}", progress) as draw:
        yield lambda event: draw(event["done_tokens"], event["total_tokens"], _note(event))


@contextmanager
def draw_counts(verb: str, progress: bool | None) -> Iterator[Callable[[int, int, str], None]]:
    """What to call with every count: done, of how many (0: not known yet), and both in words.

    True draws a bar on stderr, or a line every few seconds where that is no terminal; False is silent; None draws on a
    terminal only.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if progress is False or (progress is None and not console.is_terminal):
        yield lambda done, total, note: None
        return
    if not console.is_terminal:
        last = 0.0

        def line(done: int, total: int, note: str) -> None:
            nonlocal last
            if total and time.monotonic() - last >= _LINES_EVERY_S:
                last = time.monotonic()
                console.print(note)

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(verb, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total or None, note=note)


def _note(event: Mapping[str, Any]) -> str:
    """A progress event in words: tokens done, speed, time left."""
    left = event.get("seconds_left")
    note = f"{event['done_tokens']:,} of {event['total_tokens']:,} tokens, {event['tokens_per_second']:,.0f} tokens/s"
    return note if left is None else f"{note}, {left:.0f} s left"
