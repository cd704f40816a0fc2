"""What a batch run is asked to do, and what it says of itself: between its caller, its actor and its files."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.errors import MessageError


class BatchError(MessageError):
    """A run that could not be begun or brought to its end; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What a run does: one output folder has one at a time."""

    questions: str  # file, folder or URI
    output: str  # folder or URI
    tenant: str
    concurrency: int  # questions in flight at most
    grouped: bool  # whether questions on one memory are asked together
    rows_per_part: int
    patience_s: float
    caller: str  # a name of the call that began it


@dataclass(frozen=True, slots=True)
class BatchReport:
    """How far a run is; the last one is its summary. Counts are of questions."""

    state: Literal["reading", "asking", "done", "stopped", "failed"] = "reading"
    total: int = 0
    already: int = 0  # recorded before this run, or the same row once more
    answered: int = 0  # recorded by this run, with an answer
    failed: int = 0  # recorded by this run, with an error
    errors: dict[str, int] = field(default_factory=dict)  # the failed, by status and title
    begun: int = 0  # how many answers the Routers began for this folder, as far as they remember; known at the end
    parts: int = 0  # files in the output folder
    ignored: tuple[str, ...] = ()  # columns that are no part of a question
    seconds: float = 0.0  # since asking began
    error: str | None = None  # why the run failed

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"questions_per_second": self.rate}

    @property
    def rate(self) -> float:
        """Questions per second."""
        return (self.answered + self.failed) / self.seconds if self.seconds else 0.0


def locate(place: str | Path) -> str:
    """A URI as it is, a path as an absolute one."""
    return place if isinstance(place, str) and "://" in place else str(Path(place).expanduser().resolve())


def until_ready(patience_s: float) -> dict[str, Any]:
    """Options of tenacity: calls again a server that says "not now", for no longer than `patience_s`."""
    from tenacity import retry_if_exception, stop_before_delay, wait_random_exponential

    return {
        "retry": retry_if_exception(lambda error: getattr(error, "status", None) in (429, 503)),
        "stop": stop_before_delay(patience_s),
        "wait": wait_random_exponential(multiplier=1.0, max=30.0, min=0.5),
        "reraise": True,
    }
