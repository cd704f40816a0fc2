"""How far many questions or files are, for people: done of all, rate, time left. A bar, lines, or a function."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnCount = Callable[[int, int, int], None]  # done, of how many (0: not known yet), done before this began

_LINES_EVERY_S = 5.0


@contextmanager
def counting(verb: str, unit: str, progress: bool | OnCount | None) -> Iterator[OnCount]:
    """What to call with every count.

    `progress`: a function is called with each; True draws a bar on stderr, or lines where that is no terminal; False
    is silent; None draws on a terminal only.
    """
    if callable(progress):
        yield progress
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if progress is False or (progress is None and not console.is_terminal):
        yield lambda done, total, before: None
        return
    rate = Rate()
    if not console.is_terminal:
        last = 0.0

        def line(done: int, total: int, before: int) -> None:
            nonlocal last
            note = rate.note(done, total, before, unit)
            if total and time.monotonic() - last >= _LINES_EVERY_S:
                last = time.monotonic()
                console.print(note)

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(verb, total=None, note="")

        def draw(done: int, total: int, before: int) -> None:
            note = rate.note(done, total, before, unit) if total else f"reading {unit}"
            bar.update(task, completed=done, total=total or None, note=note)

        yield draw


class Rate:
    """The mean rate since the first count whose total was known."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None
        self._first = 0

    def note(self, done: int, total: int, before: int, unit: str) -> str:
        """In words: done, rate, time left."""
        now = self._clock()
        if self._began is None and total:
            self._began, self._first = now, done
        note = f"{done:,} of {total:,} {unit}"
        fresh = done - max(before, self._first)
        if self._began is None or now <= self._began or fresh <= 0:
            return note
        rate = fresh / (now - self._began)
        return f"{note}, {rate:.2f}/s, {_duration((total - done) / rate)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
