"""The sentences that best support an answer, chosen by their vectors: used by the Retriever."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from retrieval_worker.messages import Evidence, Passage

_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


@dataclass(frozen=True, slots=True)
class Sentences:
    """The sentences of one passage, with their vectors."""

    slices: list[tuple[int, int]]  # in the passage's text
    vectors: np.ndarray  # float32 [sentences, dimension], rows of unit length


def sentence_texts(text: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Slices of the sentences of a passage's text, and the sentences."""
    slices = split_sentences(text)
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


def split_sentences(text: str, language: str | None = None) -> list[tuple[int, int]]:
    """Slices `(start, end)` of the sentences of `text`, in order, without surrounding white space.

    `language` is a code such as en or zh; none detects Chinese by its script. What holds no letter or
    digit is not a sentence.
    """
    from sentencex import get_sentence_boundaries

    slices = []
    for boundary in get_sentence_boundaries(language or detect_language(text), text):
        start, end = boundary["start_index"], boundary["end_index"]
        piece = text[start:end]
        if any(character.isalnum() for character in piece):
            start += len(piece) - len(piece.lstrip())
            slices.append((start, start + len(piece.strip())))
    return slices


def detect_language(text: str) -> str:
    """`zh` where Chinese characters outweigh Latin words (of some four letters each), else `en`."""
    return "zh" if 4 * len(_CJK.findall(text)) > len(_LATIN.findall(text)) else "en"
