"""A family of chronicles of invented towns, with exact ground truth: texts to train on and to be measured on.

    python -m examples.chronicles --seed 7 --facts 300 --split test  # one chronicle, as text
    python -m examples.chronicles --seed 7 --facts 40 --count 1000 --json  # documents with questions, one a line

The same seed gives the same chronicle. A document is a dictionary as `memorag train` reads it:

    {"id", "title", "language", "text", "questions": [{"question", "answers", "kind", "evidence", "bridge",
                                                       "clues", "surrogate"}]}

`evidence` are the character offsets of the sentence that holds the answer. `kind` is `direct` (asked by the
person), `inverse` (asked for the person), `event` (asked by the year) or `two-step`: asked by a description of the
person, in words of which no content word is in the evidence; `bridge` are the offsets of the sentence that
resolves the description. `clues` are the sentences to recall, in the order in which they are needed, and `surrogate`
is a question that names what the two-step one only describes.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from examples.chronicle_words import (
    EVENTS,
    PEOPLE,
    PORTS,
    QUIET,
    RELATIONS,
    SYLLABLES,
    TOLD_YEARS,
    WORDS,
    Relation,
    openings,
    roman,
)

Split = Literal["train", "test"]
KINDS = ("direct", "inverse", "event", "two-step")


@dataclass(frozen=True)
class Fact:
    """One sentence of a chronicle that can be asked for."""

    relation: str
    person: str
    value: str
    start: int  # offsets of its sentence
    end: int


@dataclass
class Chronicle:
    """A text, what is true in it, and what can be asked."""

    text: str
    facts: list[Fact] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Style:
    """What the chronicles of a stage of training hold. The default is the whole family."""

    relations: tuple[str, ...] = tuple(RELATIONS)
    kinds: tuple[str, ...] = KINDS  # of questions
    facts_a_person: int = 4  # at most, and on average one less
    quiet: float = 0.8  # sentences that tell nothing, a fact
    years: bool = True  # in paragraphs, each with its year and event
    verbs: int = 4  # of a relation that are used, at most, and the questions with them
    openings: bool = True  # of every other sentence: another than the person
    babble: float = 0.0  # sentences of words at random, a fact: only reciting can ask for them


def write(seed: int, facts: int = 40, split: Split = "train", style: Style | None = None) -> Chronicle:
    """A chronicle of `facts` facts. The split `test` has held-out names, and held-out templates among the others."""
    style = style or Style()
    draw = random.Random(f"{split} {seed}")
    held_out = split == "test"
    told = [*_draw_facts(draw, facts, held_out, style)]
    draw.shuffle(told)
    chronicle = Chronicle("")
    events = draw.sample(EVENTS, len(EVENTS))
    year = draw.randrange(1200, 1215)
    pieces: list[str] = []
    length = 0

    def tell(sentence: str, end: str = " ") -> tuple[int, int]:
        nonlocal length
        start = length
        pieces.append(sentence + end)
        length += len(sentence) + len(end)
        return start, start + len(sentence)

    left = 0
    for relation, person, value in told:
        if style.years and not left:
            if pieces:
                pieces[-1] = pieces[-1][:-1] + "\n"
            year += 1
            told_year = roman(year)
            left = draw.randint(2, 6)
            if events and draw.random() < 0.7:
                event = events.pop()
                span = tell(f"In the year {told_year} came {event}.")
                chronicle.facts.append(Fact("event", told_year, event, *span))
            else:
                tell(f"The year {told_year}.")
        left -= 1
        sentence = _sentence(draw, RELATIONS[relation], held_out, style).format(p=person, v=value)
        chronicle.facts.append(Fact(relation, person, value, *tell(sentence)))
        if draw.random() < style.quiet:
            tell(draw.choice(QUIET))
        if draw.random() < style.babble:
            tell(f"{' '.join(draw.choices((*WORDS, *TOLD_YEARS), k=draw.randint(4, 9)))}.")
    chronicle.text = "".join(pieces).rstrip()
    chronicle.questions = [q for q in _questions(draw, chronicle, held_out, style) if q["kind"] in style.kinds]
    return chronicle


def document(seed: int, facts: int = 40, split: Split = "train", style: Style | None = None) -> dict[str, Any]:
    """A chronicle as a document with questions."""
    chronicle = write(seed, facts, split, style)
    return {
        "id": f"chronicle-{split}-{seed}",
        "title": f"Chronicle {seed}",
        "language": "en",
        "text": chronicle.text,
        "questions": chronicle.questions,
    }


def training_documents(
    seed: int,
    count: int,
    facts: Sequence[int] = (20, 60),
    split: Split = "train",
    **style: Any,
) -> list[dict[str, Any]]:
    """`count` documents for one step of training, of as many facts as drawn from the range `facts`."""
    read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in style.items()}
    made = Style(**read)
    draw = random.Random(seed)
    documents = [document(draw.randrange(2**60), draw.randint(*facts), split, made) for _ in range(count)]
    for each in documents:
        each["questions"] = _balance(draw, each["questions"])
    return documents


def _balance(draw: random.Random, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many of each kind, some of them more than once, so that rare kinds are learnt, too."""
    of_kind = {kind: [q for q in questions if q["kind"] == kind] for kind in KINDS}
    most = max(map(len, of_kind.values()))
    return [question for asked in of_kind.values() if asked for question in draw.choices(asked, k=most)]


def training_passages(
    seed: int, count: int, facts: Sequence[int] = (20, 40), passages: int = 3, characters: int = 400, **style: Any
) -> list[dict[str, Any]]:
    """`count` prompts as the generator is given them: passages of a chronicle, in order, some of them needed.

    As documents with a frame; an answer names the passage it rests on. Two-step questions need both sentences in.
    """
    draw = random.Random(seed)
    made = []
    for source in training_documents(seed, count, facts, **style):
        slices = _passages(source["text"], characters)
        chosen = sorted(draw.sample(slices, min(passages, len(slices))))
        text, questions = "", []
        for number, (start, end) in enumerate(chosen, 1):
            shift = len(text) + len(f"[{number}] ") - start
            text += f"[{number}] {source['text'][start:end]}\n\n"
            for question in source["questions"]:
                (a, b), *_ = question["evidence"]
                if start <= a and b <= end:
                    moved = {"evidence": [[a + shift, b + shift]], "answers": [f"{question['answers'][0]} [{number}]"]}
                    questions.append(question | moved)
        inside = [
            q for q in questions if all(any(s <= a and b <= e for s, e in chosen) for a, b in q.get("bridge", []))
        ]
        asked = [{name: value for name, value in question.items() if name != "bridge"} for question in inside]
        made.append({"language": "en", "text": text.rstrip(), "questions": asked, "frame": _generator_frame()})
    return made


def _passages(text: str, characters: int) -> list[tuple[int, int]]:
    """Slices of whole sentences, each as long as fits."""
    slices: list[tuple[int, int]] = []
    for sentence in re.finditer(r"\S[^.]*\.", text):
        if slices and sentence.end() - slices[-1][0] <= characters:
            slices[-1] = slices[-1][0], sentence.end()
        else:
            slices.append(sentence.span())
    return slices


@cache
def _generator_frame() -> dict[str, str]:
    """What stands around passages and question in the generator's own prompt."""
    from generator_worker.messages import GenerateRequest, Source
    from generator_worker.prompts import build_prompt

    class Verbatim:
        chat_template, all_special_tokens = None, ()

        def encode(self, text: str) -> str:
            return text

        def get_added_vocab(self) -> dict[str, int]:
            return {}

    source = Source("\ue000")
    request = GenerateRequest("answer", "\ue001", (source,), "en", None, "")
    prompt = build_prompt(Verbatim(), request, 10**6, 1)
    before, between = prompt.messages[0]["content"].removesuffix("\ue001").split("[1] \ue000")
    return {"before": before, "between": between}


def tokenizer_texts() -> Iterator[str]:
    """What the tokenizer of a model of chronicles is made from: every word, year and syllable of a name by itself.

    So each is one token, and no name is: a name is two, which held-out names share with those of training.
    """
    words = (*WORDS, *TOLD_YEARS)
    for piece in (*(f" {word}" for word in words), *(word for word in WORDS if word[0].isupper())):
        yield f"{piece}\n"
    for syllable in SYLLABLES:  # more often, so that merges inside them come before those across them
        yield f"{syllable}\n" * (1000 if syllable.startswith(" ") else 100)


def _draw_facts(draw: random.Random, count: int, held_out: bool, style: Style) -> list[tuple[str, str, str]]:
    people = draw.sample(PEOPLE[held_out], min(2 * count + 2, len(PEOPLE[held_out])))
    ports = PORTS[held_out]
    unused = {
        name: draw.sample(values, len(values))
        for name in style.relations
        if (values := RELATIONS[name].values or (ports if name == "voyage" else ()))
    }
    told: list[tuple[str, str, str]] = []
    while len(told) < count:
        if len(people) < 2:
            raise ValueError(f"{count} facts are more than the names of a split allow; ask for fewer")
        person = people.pop()
        at_most = min(style.facts_a_person, len(style.relations))
        for relation in draw.sample(style.relations, draw.randint(max(1, at_most - 2), at_most)):
            pool = unused.get(relation)
            if relation == "marriage":
                value = people.pop()
            else:
                if not pool:
                    pool = unused[relation] = list(RELATIONS[relation].values or ports)
                    draw.shuffle(pool)
                value = pool.pop()
            told.append((relation, person, value))
            if len(told) == count or len(people) < 2:
                break
    return told


def _questions(draw: random.Random, chronicle: Chronicle, held_out: bool, style: Style) -> list[dict[str, Any]]:
    """Every question that has one answer."""
    asked: list[dict[str, Any]] = []
    holders: dict[tuple[str, str], list[Fact]] = {}
    of_person: dict[str, list[Fact]] = {}
    for fact in chronicle.facts:
        holders.setdefault((fact.relation, fact.value), []).append(fact)
        of_person.setdefault(fact.person, []).append(fact)

    def ask(kind: str, question: str, answer: str, fact: Fact, bridge: Fact | None, surrogate: str) -> None:
        parts = [bridge, fact] if bridge else [fact]
        entry: dict[str, Any] = {
            "question": question,
            "answers": [answer],
            "kind": kind,
            "evidence": [[fact.start, fact.end]],
            "clues": [chronicle.text[part.start : part.end] for part in parts],
            "surrogate": surrogate,
        }
        if bridge:
            entry["bridge"] = [[bridge.start, bridge.end]]
        asked.append(entry)

    for fact in chronicle.facts:
        if fact.relation == "event":
            question = f"What came in the year {fact.person}?"
            ask("event", question, fact.value, fact, None, question)
            continue
        relation = RELATIONS[fact.relation]
        direct = _pick(draw, relation.direct, held_out, style.verbs).format(p=fact.person)
        ask("direct", direct, fact.value, fact, None, direct)
        if relation.inverse and len(holders[fact.relation, fact.value]) == 1:
            inverse = _pick(draw, relation.inverse, held_out, style.verbs).format(v=fact.value)
            ask("inverse", inverse, fact.person, fact, None, inverse)
        bridges = [
            other
            for other in of_person[fact.person]
            if other is not fact
            and RELATIONS[other.relation].described
            and len(holders[other.relation, other.value]) == 1
        ]
        if bridges:
            bridge = draw.choice(bridges)
            who = RELATIONS[bridge.relation].described.format(v=_definite(bridge.value))
            hidden = _pick(draw, relation.hidden, held_out, style.verbs).format(who=who)
            ask("two-step", hidden, fact.value, fact, bridge, direct)
    return asked


def _sentence(draw: random.Random, relation: Relation, held_out: bool, style: Style) -> str:
    """A template for {p} and {v}."""
    verb = draw.randrange(min(style.verbs, len(relation.verbs)))
    opening = "{p}"
    if style.openings and draw.random() < (2 / 3 if held_out else 1 / 2):
        opening = draw.choice(openings(verb, held_out))
    return f"{opening} {relation.verbs[verb]} {{v}}."


def _pick(draw: random.Random, questions: tuple[str, ...], held_out: bool, wordings: int) -> str:
    """One of the first `wordings` questions, never the last one; in the test split any."""
    return draw.choice(questions if held_out else questions[: min(wordings, len(questions) - 1)])


def _definite(value: str) -> str:
    return f"the {value[2:]}" if value.startswith("a ") else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--facts", type=int, default=300)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--count", type=int, default=1, help="chronicles, with seeds from --seed on")
    parser.add_argument("--json", action="store_true", help="documents with their questions, one a line")
    arguments = parser.parse_args()
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        made = document(seed, arguments.facts, arguments.split)
        print(json.dumps(made) if arguments.json else made["text"])


if __name__ == "__main__":
    main()
