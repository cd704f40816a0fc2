"""Questions with answers as training for a reader and for a memory, as `memorag train` takes them.

Of documents `{"text", "questions": [{"question", "answers", "evidence"}]}` (SQuAD, FairytaleQA, one's own):
`questions_on_passages` makes conversations in the generator's own prompts, on passages that BM25 finds, as users' are;
`texts_to_remember` makes documents whose clues are the sentences that hold the answers. Named in a run's YAML as
`examples.readings:FUNCTION`.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from generator_worker.messages import GenerateRequest, GenerateTask
from generator_worker.prompts import write_message
from memory_worker.training.config import TrainingError
from memory_worker.training.data import records
from retrieval_worker.bm25 import Bm25, words
from retrieval_worker.passages import cut

NOT_SAID = "The passages do not say."  # as the prompt asks for it
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"”’')\]]*(?=\s|$)|\n\s*\n|$)", re.S)
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Dr|St|vs|etc|Jr|Sr|No|Inc|Ltd|[A-Z])\.$")
_MOST_CHARACTERS = 170  # of a clue
_TRIES = 100  # documents drawn for each record at most
_ASKED_FOR_A_SENTENCE = (" Answer in a sentence.", " Answer in one full sentence.", " Reply with a whole sentence.")

Span = tuple[int, int]


@dataclass(frozen=True)
class Answered:
    """A question, and where its answer stands."""

    question: str
    answer: str
    evidence: tuple[Span, ...]
    sentence: Span
    exact: Span | None  # of the answer; none where the text says it in other words

    @property
    def place(self) -> Span:
        return self.exact or (sum(self.sentence) // 2,) * 2


@dataclass(frozen=True)
class Reading:
    """A document with the questions whose answers were found in it."""

    text: str
    language: str
    questions: tuple[Answered, ...]
    _cuts: dict[int, tuple[list[Span], Bm25]] = field(default_factory=dict)

    def passages(self, characters: int) -> tuple[list[Span], Bm25]:
        """Its passages as the Retriever cuts them, and what scores them by words."""
        if characters not in self._cuts:
            spans = cut(self.text, characters)
            self._cuts[characters] = spans, Bm25(self.text[a:b] for a, b in spans)
        return self._cuts[characters]


def questions_on_passages(
    seed: int,
    count: int,
    files: Sequence[str],
    *,
    characters: Sequence[int] = (400, 500, 600),
    passages: tuple[int, int] = (2, 6),
    questions: int = 10,
    unanswered: float = 0.22,
    short: float = 0.08,
    summaries: float = 0.05,
) -> list[dict[str, Any]]:
    """`count` records of conversations that share their passages: those found for one question, and others on them.

    A share of `unanswered` is asked of other places in the document, the likeliest to find these passages first; their
    passages do not say. `short` of the records ask for a phrase without citation, `summaries` for a summary.
    """
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for _ in range(_TRIES * count):
        if len(made) == count:
            return made
        reading = _draw_reading(draw, tuple(files))
        spans, bm25 = reading.passages(draw.choice(characters))
        homes = {question: home for question in reading.questions if (home := _home(spans, question.place)) is not None}
        if len(spans) < 2 or not homes:
            continue
        wanted = min(draw.randint(*passages), len(spans) - 1)
        first = draw.choice([*homes])
        found = _find(bm25, first.question, wanted)
        if homes[first] not in found and draw.random() < 0.7:  # as clues would have found it
            found[-1] = homes[first]
        chosen = sorted(set(found))
        texts = [reading.text[a:b] for a, b in (spans[n] for n in chosen)]
        turns = _summary(reading, spans, chosen, texts) if draw.random() < summaries else []
        if not turns:
            brief = draw.random() < short
            ask = partial(_ask, "answer", texts, brief)
            inside = [question for question in homes if homes[question] in chosen]
            for question in draw.sample(inside, min(questions, len(inside))):
                asked, answer = question.question, question.answer
                if not brief and draw.random() < 0.06:
                    asked += draw.choice(_ASKED_FOR_A_SENTENCE)
                    answer = _line(reading.text, question.sentence)
                turns.append((ask(asked), answer if brief else f"{answer} [{chosen.index(homes[question]) + 1}]"))
            outside = [q for q in homes if not _is_said(q, spans, chosen, texts)]
            outside = draw.sample(outside, min(24, len(outside)))
            outside.sort(key=lambda q: -len({*chosen} & {*_find(bm25, q.question, wanted)}))
            share = round(len(turns) * unanswered / (1 - unanswered))
            turns += [(ask(question.question), NOT_SAID) for question in outside[: max(1, share)]]
        if turns:
            made.append({"shared": [_conversation(*turn) for turn in turns]})
    raise TrainingError(f"passages of {characters} characters hold hardly an answer: give larger `characters`")


def texts_to_remember(seed: int, count: int, files: Sequence[str]) -> list[dict[str, Any]]:
    """`count` documents whose questions have as clue the sentence that holds the answer, in one line.

    Where people asked twice for the same answer in the same sentence, the wording nearer to the text is the other's
    `surrogate`.
    """
    draw, made = random.Random(seed), []
    for _ in range(count):
        reading = _draw_reading(draw, tuple(files))
        twins: dict[tuple[Span, str], list[Answered]] = {}
        for question in reading.questions:
            twins.setdefault((question.sentence, question.answer.casefold()), []).append(question)
        told = []
        for question in reading.questions:
            sentence = reading.text[slice(*question.sentence)]
            others = [q.question for q in twins[question.sentence, question.answer.casefold()] if q is not question]
            near = max(others, key=lambda other: _shared(other, sentence), default=question.question)
            told.append(
                {
                    "question": question.question,
                    "answers": [question.answer],
                    "evidence": [list(question.sentence)],
                    "clues": [_clip(reading.text, question)],
                    "surrogate": near,
                }
            )
        made.append({"text": reading.text, "language": reading.language, "questions": told})
    return made


@lru_cache(maxsize=2)
def _readings(files: tuple[str, ...]) -> tuple[list[Reading], list[int]]:
    """All documents of the files that have questions, and how often each is drawn: by its questions, 80 at most."""
    readings = []
    for record in records(files):
        found = [answered for q in record["questions"] if (answered := _locate(record["text"], q))]
        if found:
            readings.append(Reading(record["text"], record.get("language", "en"), tuple(found)))
    if not readings:
        raise TrainingError(
            f"no answer was found in the texts of {', '.join(files)}: `answers` and `evidence` locate them"
        )
    return readings, [min(80, len(reading.questions)) for reading in readings]


def _draw_reading(draw: random.Random, files: tuple[str, ...]) -> Reading:
    """From a file drawn first: a large one does not crowd out a small one."""
    return draw.choices(*_readings((draw.choice(files),)))[0]


def _locate(text: str, question: dict[str, Any]) -> Answered | None:
    """Where the answer stands: the sentence of the evidence that holds it and has most words of the question.

    Where none holds it word for word, the one that shares most words with question and answer, two at least.
    """
    answers = [answer.strip() for answer in question["answers"] if answer.strip()]
    if not answers:
        return None
    best: tuple[int, Span, Span | None] | None = None
    for answer in answers[:2]:
        for start, end in question["evidence"]:
            sentences = _sentences(text, start, end)
            for match in re.finditer(re.escape(answer.rstrip(".")), text[start:end], re.I):
                place = (start + match.start(), start + match.end())
                for sentence in sentences:
                    if sentence[0] <= place[0] and place[1] <= sentence[1]:
                        score = _shared(question["question"], text[slice(*sentence)])
                        if best is None or score > best[0]:
                            best = score, sentence, place
        if best:
            break
    if best is None:
        for start, end in question["evidence"]:
            for sentence in _sentences(text, start, end):
                score = _shared(f"{question['question']} {answers[0]}", text[slice(*sentence)])
                if score >= 2 and (best is None or score > best[0]):
                    best = score, sentence, None
    evidence = tuple((start, end) for start, end in question["evidence"])
    return best and Answered(question["question"].strip(), answers[0], evidence, best[1], best[2])


def _sentences(text: str, start: int, end: int) -> list[Span]:
    found: list[Span] = []
    begin = None
    for match in _SENTENCE.finditer(text, start, end):
        first = match.start() if begin is None else begin
        stop = match.start() + len(match.group().rstrip())
        begin = first if _ABBREVIATION.search(text[first:stop]) and stop < end else None
        if begin is None:
            found.append((first, stop))
    return found


def _home(spans: Sequence[Span], place: Span) -> int | None:
    return next((n for n, (a, b) in enumerate(spans) if a <= place[0] and place[1] <= b), None)


def _find(bm25: Bm25, question: str, count: int) -> list[int]:
    """The best passages, best first."""
    return [int(n) for n in bm25.scores(question).argsort()[::-1][:count]]


def _is_said(question: Answered, spans: Sequence[Span], chosen: Sequence[int], texts: Sequence[str]) -> bool:
    """Whether the passages chosen hold a part of the evidence, or the answer's words by chance."""
    of_evidence = any(a < spans[n][1] and spans[n][0] < b for a, b in question.evidence for n in chosen)
    return of_evidence or question.answer.casefold() in "\n".join(texts).casefold()


def _summary(
    reading: Reading, spans: Sequence[Span], chosen: Sequence[int], texts: Sequence[str]
) -> list[tuple[str, str]]:
    """Of each passage the sentence that people ask most about; one turn, or none where that would be too little."""
    asked = Counter(question.sentence for question in reading.questions)
    told = []
    for number, place in enumerate(chosen, 1):
        sentences = [s for s in _sentences(reading.text, *spans[place]) if 30 < s[1] - s[0] < 240]
        if sentences:
            told.append(f"{_line(reading.text, max(sentences, key=lambda s: (asked[s], -s[0])))} [{number}]")
    return [(_ask("summarize", texts, False, ""), " ".join(told[:5]))] if len(told) > 1 else []


def _ask(task: GenerateTask, texts: Sequence[str], short: bool, question: str) -> str:
    request = GenerateRequest(task, question, (), "en", None, "", short)
    return write_message(request, texts)


def _conversation(asked: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]}


def _line(text: str, span: Span) -> str:
    return " ".join(text[slice(*span)].split())


def _clip(text: str, question: Answered) -> str:
    """The sentence in one line, cut at words around the answer where it is long."""
    start, end = question.sentence
    if end - start > _MOST_CHARACTERS:
        first, last = question.exact or (start, start + 1)
        start = max(start, min(first - (_MOST_CHARACTERS - (last - first)) // 2, end - _MOST_CHARACTERS))
        stop = min(end, max(start + _MOST_CHARACTERS, last))
        if start > question.sentence[0]:
            start = text.find(" ", start, first) + 1 or first
        end = stop if stop == end else max(text.rfind(" ", last, stop), last)
    return _line(text, (start, end))


def _shared(one: str, other: str) -> int:
    return len({word for word in words(one) if len(word) > 3} & {*words(other)})
