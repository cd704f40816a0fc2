"""The sentences that best support an answer, chosen by their vectors: used by the Retriever."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from retrieval_worker.messages import Evidence, Passage
from retrieval_worker.sentences import sentences


@dataclass(frozen=True, slots=True)
class PassageSentences:
    """The sentences of one passage, with their vectors."""

    passage: Passage
    slices: list[tuple[int, int]]  # in the passage's text
    vectors: np.ndarray  # float32 [sentences, dimension], rows of unit length


def sentence_texts(passage: Passage) -> tuple[list[tuple[int, int]], list[str]]:
    """Slices of the passage's sentences, and the sentences."""
    slices = sentences(passage.text)
    return slices, [passage.text[start:end] for start, end in slices]


def choose(candidates: Iterable[PassageSentences], targets: np.ndarray, count: int) -> list[Evidence]:
    """The `count` sentences with the highest score, best first; of overlapping or equal ones only the best.

    A sentence's score is the mean of its cosine similarities to `targets` `[question (and answer), dimension]`.
    """
    scored = []
    for candidate in candidates:
        similarity = candidate.vectors @ targets.T  # [sentences, targets]
        for (start, end), score in zip(candidate.slices, similarity.mean(axis=1).tolist(), strict=True):
            passage = candidate.passage
            text = passage.text[start:end]
            scored.append(Evidence(passage.document, passage.start + start, passage.start + end, text, score))
    scored.sort(key=lambda found: (-found.score, found.document, found.start))
    chosen: list[Evidence] = []
    for found in scored:
        if len(chosen) == count:
            break
        if not any(_same(found, other) for other in chosen):
            chosen.append(found)
    return chosen


def _same(one: Evidence, other: Evidence) -> bool:
    overlap = one.document == other.document and one.start < other.end and other.start < one.end
    return overlap or one.text == other.text
