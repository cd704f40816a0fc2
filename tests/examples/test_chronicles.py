"""Chronicles are exact: what they say can be asked, is where it is said to be, and held-out words are held out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from examples.chronicle_words import OPENINGS, PEOPLE, PORTS, RELATIONS, WORDS, YEARS, openings
from examples.chronicles import KINDS, document, tokenizer_texts, training_documents, write
from memory_worker.training.tokenizer import write_training_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLE = ["--seed", "7", "--facts", "150", "--split", "test"]
FUNCTION_WORDS = (
    "a an the of to in by from at for and up with on was were is are did do does had what which who whom whose where "
    "when how"
)


def content_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower())) - set(FUNCTION_WORDS.split())


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_in_its_evidence_and_every_kind_is_asked(split):
    kinds = set()
    for seed in range(20):
        made = document(seed, 60, split)
        assert made == document(seed, 60, split)
        for question in made["questions"]:
            (start, end), *_ = question["evidence"]
            evidence = made["text"][start:end]
            assert evidence == question["clues"][-1] and evidence.endswith(".")
            assert question["answers"][0] in evidence
            kinds.add(question["kind"])
    assert kinds == set(KINDS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_step_questions_share_no_content_word_with_their_evidence(split):
    asked = 0
    for seed in range(40):
        chronicle = write(seed, 60, split)
        for question in chronicle.questions:
            if question["kind"] != "two-step":
                continue
            asked += 1
            (start, end), *_ = question["evidence"]
            shared = content_words(question["question"]) & content_words(chronicle.text[start:end])
            assert not shared, (question["question"], chronicle.text[start:end])
            bridge, evidence = question["clues"]
            person = next(name for name in re.findall(r"[A-Z]\w+", bridge) if name in PEOPLE[split == "test"])
            assert person in evidence  # what leads from the one to the other
    assert asked > 500


def test_an_answer_is_the_only_one():
    chronicle = write(3, 200, "test")
    told = {(fact.relation, fact.person) for fact in chronicle.facts}
    assert len(told) == len(chronicle.facts)
    for question in chronicle.questions:
        if question["kind"] == "inverse":
            (start, end), *_ = question["evidence"]
            fact = next(f for f in chronicle.facts if (f.start, f.end) == (start, end))
            assert [f.person for f in chronicle.facts if (f.relation, f.value) == (fact.relation, fact.value)] == (
                question["answers"]
            )


def test_names_and_templates_are_held_out():
    assert not set(PEOPLE[True]) & set(PEOPLE[False]) and not set(PORTS[True]) & set(PORTS[False])
    texts: dict[str, str] = {}
    for split in ("train", "test"):
        made = [document(seed, 80, split) for seed in range(60)]
        texts[split] = " ".join(each["text"] for each in made)
        texts[f"{split} questions"] = "\n".join(q["question"] for each in made for q in each["questions"])
    assert not [name for name in PEOPLE[True] if re.search(rf"\b{name}\b", texts["train"])]

    told = []
    for relation in RELATIONS.values():
        for number, verb in enumerate(relation.verbs):
            apart = set(openings(number, True)) - set(openings(number, False))
            told += [opening.format(p=r"\w+") + rf" {verb}\b" for opening in apart]
    last = [q[-1] for each in RELATIONS.values() for q in (each.direct, each.inverse, each.hidden) if q]
    asked = [
        re.escape(question).replace(r"\{", "{").replace(r"\}", "}").format(p=r"\w+", v=".+", who=".+")
        for question in last
    ]
    for name, patterns in (("", told), (" questions", asked)):
        unmet = [pattern.rstrip(".") for pattern in patterns]
        assert not [pattern for pattern in unmet if re.search(pattern, texts[f"train{name}"])]
        assert not [pattern for pattern in unmet if not re.search(pattern, texts[f"test{name}"])]


def test_held_out_templates_are_made_of_words_of_the_others():
    last = [q[-1] for each in RELATIONS.values() for q in (each.direct, each.inverse, each.hidden) if q]
    assert set(re.findall(r"[A-Za-z]{2,}", re.sub(r"\{\w+\}", "", " ".join((*OPENINGS, *last))))) <= set(WORDS)


def test_a_name_is_two_tokens_and_a_word_is_one(tmp_path):
    write_training_tokenizer(tmp_path, tokenizer_texts(), 1300)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    names = [name for held_out in (False, True) for name in (*PEOPLE[held_out], *PORTS[held_out])]
    assert {len(tokenizer.encode(f" {name}").ids) for name in names} == {2}
    assert {len(tokenizer.encode(f" {word}").ids) for word in (*WORDS, *YEARS)} == {1}


def test_any_length_and_as_many_as_wanted():
    assert len(write(1, 300, "test").text.split()) > 2000
    short = training_documents(5, 3, (4, 8), kinds=["direct"], years=False, quiet=0)
    assert len(short) == 3 and all(4 <= len(made["questions"]) <= 8 for made in short)
    with pytest.raises(ValueError, match="ask for fewer"):
        write(1, 5000)


def test_the_example_text_is_what_its_program_writes():
    made = subprocess.run(
        [sys.executable, "-m", "examples.chronicles", *EXAMPLE], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert made == (ROOT / "examples" / "chronicle.txt").read_text("utf-8")
