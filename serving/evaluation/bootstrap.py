"""How sure a mean or a difference is: the percentile bootstrap over documents, seeded.

Questions on one text are not independent of each other, so texts are drawn, each with all of its questions; where each
has one question, that is the ordinary bootstrap (Efron, 1979). Differences are paired: both methods' scores of the
same questions are drawn together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval; without one where a single document cannot tell."""

    mean: float
    low: float | None
    high: float | None
    count: int  # questions


def interval(values: Sequence[float], documents: Sequence[str]) -> Interval:
    """Of the mean of `values`, one for each question; `documents` names the text each is about."""
    from scipy.stats import bootstrap

    names = sorted(set(documents))
    place = {name: row for row, name in enumerate(names)}
    rows = np.array([place[document] for document in documents])
    sums = np.bincount(rows, np.asarray(values, np.float64), len(names))
    counts = np.bincount(rows, minlength=len(names)).astype(np.float64)
    mean = float(sums.sum() / counts.sum())
    if len(names) < 2:
        return Interval(mean, None, None, len(values))

    def mean_of(sums: Any, counts: Any, axis: int) -> Any:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    found = bootstrap(
        (sums, counts),
        mean_of,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=_RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(values))


def difference(one: Sequence[float], other: Sequence[float], documents: Sequence[str]) -> Interval:
    """Of the mean of `one` - `other`, paired: the scores of the same questions by two methods."""
    return interval([a - b for a, b in zip(one, other, strict=True)], documents)
