"""How far many questions or files are, for people: done of all, rate, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving.client.progress import draw_counts

OnCount = Callable[[int, int, int], None]  # done, of how many (0: not known yet), done before this began


@contextmanager
def counting(verb: str, unit: str, progress: bool | OnCount | None) -> Iterator[OnCount]:
    """What to call with every count: the caller's function, or what draws it as `draw_counts` does."""
    if callable(progress):
        yield progress
        return
    rate = Rate()
    with draw_counts(verb, progress) as draw:
        yield lambda done, total, before: draw(
            done, total, rate.note(done, total, before, unit) if total else f"reading {unit}"
        )


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
