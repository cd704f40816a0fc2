"""Whether the passages that were found hold what the answer needs."""

from collections.abc import Sequence
from dataclasses import dataclass

from serving.evaluation.datasets import Example

KS = (1, 3, 5, 10)


@dataclass(frozen=True, slots=True)
class Found:
    """A passage of the example's text, by its characters."""

    start: int
    end: int
    score: float


def rank_passages(passages: Sequence[Found]) -> list[Found]:
    """Best first; answers give them in document order."""
    return sorted(passages, key=lambda passage: (-passage.score, passage.start))


def evidence_recall(example: Example, best_first: Sequence[Found], k: int) -> float | None:
    """The share of the example's evidence spans that one of the first `k` passages touches; none without evidence."""
    if not example.evidence:
        return None
    kept = best_first[:k]
    touched = [any(p.start < end and start < p.end for p in kept) for start, end in example.evidence]
    return sum(touched) / len(touched)


def answer_recall(example: Example, best_first: Sequence[Found], k: int) -> float | None:
    """1 where one of the first `k` passages holds an answer word for word; none where the text does not hold one."""
    answers = [answer for answer in example.answers if answer and answer in example.text]
    if not answers or example.metric != "f1":
        return None
    return float(any(answer in example.text[p.start : p.end] for p in best_first[:k] for answer in answers))
