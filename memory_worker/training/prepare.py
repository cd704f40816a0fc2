"""A user's own documents as training tasks, made without a model: cloze spans, evidence recall, surrogate questions.

Each task is a question on one sentence, with its answer and its offsets, in the form that `memorag train` reads. The
sentences chosen are those that say something of their own: with words that are rare in the document.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from memory_worker.training.config import TrainingError

Task = Literal["cloze", "evidence", "surrogate"]
TASKS: tuple[Task, ...] = ("cloze", "evidence", "surrogate")

_PARAGRAPH = re.compile(r"\n\s*\n")
_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)\.+[\"”’)」』]*(?=\s|$)|[!?]+[\"”’)]*(?=\s|$)|[。！？]+[”’」』]*"
)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+(?:[.,:]\d+)*")
_SUBJECT = re.compile(r"^((?:[A-Z][\w'’-]+ ?){1,3}) ([a-z]+(?:ed|ew|ook|ame|ave|ent|ade|old|uilt|ound|ought)\b.*)[.!]$")
_LEAST_WORDS, _MOST_WORDS = 5, 60
_WORDS = {
    "en": ("Fill in what is missing: {0}", "What does the text say about {0}?", " and "),
    "zh": ("请填空：{0}", "文中关于{0}是怎么说的？", "和"),
}


def prepare(
    text: str,
    *,
    id: str,
    title: str,
    language: str = "en",
    tasks: tuple[Task, ...] = TASKS,
    most: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """A document with at most `most` questions on it, of the kinds in `tasks`. Equal seeds make equal tasks.

    Raises `ValueError` for a text in which no sentence can be asked about.
    """
    draw = random.Random(f"{seed} {id}")
    counts = Counter(word.casefold() for word in _WORD.findall(text))
    candidates = [(start, end) for start, end in _sentences(text) if _is_telling(text[start:end], counts)]
    if not candidates:
        raise TrainingError(f"{title} has no sentence that can be asked about: give a text of whole sentences")
    chosen = sorted(draw.sample(candidates, min(most, len(candidates))))
    makers = {"cloze": _cloze, "evidence": _evidence, "surrogate": _surrogate}
    questions = []
    for start, end in chosen:
        sentence = " ".join(text[start:end].split())
        kind = draw.choice(tasks)
        questions.append(makers[kind](sentence, counts, language) | {"evidence": [[start, end]], "clues": [sentence]})
    return {"id": id, "title": title, "language": language, "text": text, "questions": questions}


def _cloze(sentence: str, counts: Counter[str], language: str) -> dict[str, Any]:
    """The sentence with its rarest word, and the names beside it, left out."""
    words = [match for match in _WORD.finditer(sentence) if len(match.group()) > 2 or match.group().isdigit()]
    rarest = min(words, key=lambda match: (counts[match.group().casefold()], -len(match.group())))
    start, end = rarest.span()
    while (more := re.match(r" [A-Z][\w'’-]+", sentence[end:])) and sentence[start].isupper():
        end += more.end()
    blank = f"{sentence[:start]}____{sentence[end:]}"
    return {"question": _WORDS[language][0].format(blank), "answers": [sentence[start:end]], "kind": "cloze"}


def _evidence(sentence: str, counts: Counter[str], language: str) -> dict[str, Any]:
    """Asks for the sentence by two of its rare words."""
    _, asked, both = _WORDS[language]
    return {"question": asked.format(both.join(_rare(sentence, counts)[:2])), "answers": [sentence], "kind": "evidence"}


def _surrogate(sentence: str, counts: Counter[str], language: str) -> dict[str, Any]:
    """A broad question, and the precise one it stands for: who did it, where that is told, or with more words."""
    rare, (_, asked, both) = _rare(sentence, counts), _WORDS[language]
    made: dict[str, Any] = {"question": asked.format(rare[0]), "answers": [sentence], "kind": "surrogate"}
    found = _SUBJECT.match(sentence) if language == "en" else None
    if found:
        return made | {"answers": [found.group(1).strip()], "surrogate": f"Who {found.group(2)}?"}
    return made | {"surrogate": asked.format(both.join(rare[:4]))}


def _rare(sentence: str, counts: Counter[str]) -> list[str]:
    """Its words, rarest first."""
    words = dict.fromkeys(word for word in _WORD.findall(sentence) if len(word) > 2)
    return sorted(words, key=lambda word: (counts[word.casefold()], -len(word)))


def _is_telling(sentence: str, counts: Counter[str]) -> bool:
    """Whether it has a length to be asked about, and a word that the text has at most three times."""
    words = _WORD.findall(sentence)
    characters = sum(len(word) for word in words)
    long_enough = _LEAST_WORDS <= len(words) <= _MOST_WORDS or (len(words) < _LEAST_WORDS and 12 <= characters <= 120)
    return long_enough and any(len(word) > 2 and counts[word.casefold()] <= 3 for word in words)


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Offsets of sentences, which may run over line ends but not over empty lines."""
    begin = 0
    for gap in [*_PARAGRAPH.finditer(text), None]:
        stop = gap.start() if gap else len(text)
        for end in [*(found.end() for found in _END.finditer(text, begin, stop)), stop]:
            piece = text[begin:end]
            if piece.strip():
                yield begin + len(piece) - len(piece.lstrip()), begin + len(piece.rstrip())
            begin = end
        begin = gap.end() if gap else stop
