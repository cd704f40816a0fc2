"""The sentences that best support an answer, chosen by their vectors: used by the Retriever."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from retrieval_worker.messages import Evidence, Passage
from retrieval_worker.sentences import sentences


@dataclass(frozen=True, slots=True)
class Sentences:
    """The sentences of one passage, with their vectors."""

    slices: list[tuple[int, int]]  # in the passage's text
    vectors: np.ndarray  # float32 [sentences, dimension], rows of unit length


def sentence_texts(text: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Slices of the sentences of a passage's text, and the sentences."""
    slices = sentences(text)
    return slices, [text[start:end] for start, end in slices]


def choose(candidates: Iterable[tuple[Passage, Sentences]], targets: np.ndarray, count: int) -> list[Evidence]:
    """The `count` sentences with the highest score, best first; of overlapping or equal ones only the best.

    A sentence's score is the mean of its cosine similarities to `targets` `[question (and answer), dimension]`.
    """
    scored = []
    for passage, candidate in candidates:
        similarity = candidate.vectors @ targets.T  # [sentences, targets]
        for (start, end), score in zip(candidate.slices, similarity.mean(axis=1).tolist(), strict=True):
            where = (passage.memory, passage.document, passage.start + start, passage.start + end)
            scored.append(Evidence(*where, passage.text[start:end], score))
    scored.sort(key=lambda found: (-found.score, found.memory, found.document, found.start))
    chosen: list[Evidence] = []
    for found in scored:
        if len(chosen) == count:
            break
        if not any(_same(found, other) for other in chosen):
            chosen.append(found)
    return chosen


def _same(one: Evidence, other: Evidence) -> bool:
    same_document = (one.memory, one.document) == (other.memory, other.document)
    return one.text == other.text or (same_document and one.start < other.end and other.start < one.end)
