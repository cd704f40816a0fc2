"""Training examples of questions: answers cite the passage that holds them, and what is not there is not said."""

import json
import re
from pathlib import Path

import pytest

from examples.readings import NOT_SAID, questions_on_passages, texts_to_remember
from memory_worker.training import TrainingError

TRADES = ("baker", "smith", "weaver", "cooper", "miller", "tanner", "mason", "fuller")
TOWNS = ("Arden", "Vey", "Corin", "Dunmere", "Elswick", "Farrow", "Galt", "Hythe")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A document of eight paragraphs, each with two questions for the same answer and one in other words."""
    text, questions = "", []
    for trade, town in zip(TRADES, TOWNS, strict=True):
        start = len(text)
        text += f"Mr. Hale the {trade} lived in {town} beside the river. Nobody ever bought anything from that man.\n\n"
        span = [[start, len(text) - 2]]
        questions += [
            {"question": f"Where did the {trade} live?", "answers": [town], "evidence": span},
            {"question": f"In which town beside the river was the {trade} Hale?", "answers": [town], "evidence": span},
            {"question": f"Was the {trade} a rich person?", "answers": ["No, nobody bought things"], "evidence": span},
        ]
    path = tmp_path_factory.mktemp("documents") / "trades.jsonl"
    path.write_text(json.dumps({"text": text, "language": "en", "questions": questions}) + "\n", "utf-8")
    return str(path)


def test_answers_cite_the_passage_that_holds_them_and_a_fifth_is_not_there(file):
    made = questions_on_passages(3, 40, [file], characters=(110,), summaries=0, short=0)
    assert made == questions_on_passages(3, 40, [file], characters=(110,), summaries=0, short=0)
    replies = []
    for record in made:
        prompts = [conversation["messages"][0]["content"] for conversation in record["shared"]]
        assert len({prompt.partition("Question:")[0] for prompt in prompts}) == 1  # read once
        for prompt, conversation in zip(prompts, record["shared"], strict=True):
            passages = dict(re.findall(r"\[(\d)\] (Mr.*?)(?=\n\n)", prompt.partition("Passages:")[2]))
            reply = conversation["messages"][1]["content"]
            replies.append(reply)
            trade = next(trade for trade in TRADES if trade in prompt.partition("Question:")[2])
            holders = [number for number, passage in passages.items() if trade in passage]
            if reply == NOT_SAID:
                assert not holders
            else:
                assert [reply[-2]] == holders and reply.endswith(f"[{holders[0]}]")
    assert 0.15 < replies.count(NOT_SAID) / len(replies) < 0.5
    assert any("Answer in" in c["messages"][0]["content"] for record in made for c in record["shared"])


def test_short_answers_cite_nothing_and_summaries_cite_each_passage(file):
    for record in questions_on_passages(1, 6, [file], characters=(110,), summaries=0, short=1):
        assert all("[" not in c["messages"][1]["content"] for c in record["shared"])
    for record in questions_on_passages(1, 6, [file], characters=(110,), summaries=1):
        (turn,) = record["shared"]
        said = turn["messages"][1]["content"]
        assert re.findall(r"\[(\d)\]", said) == [str(n) for n in range(1, len(re.findall(r"\[", said)) + 1)]
        assert "Question:" not in turn["messages"][0]["content"]


def test_clues_are_whole_sentences_and_questions_become_those_nearer_to_the_text(file):
    (document,) = texts_to_remember(5, 1, [file])
    first, second, third = document["questions"][:3]
    sentence = "Mr. Hale the baker lived in Arden beside the river."
    assert first["clues"] == second["clues"] == [sentence]
    assert document["text"][slice(*first["evidence"][0])] == sentence
    assert third["clues"] == ["Nobody ever bought anything from that man."]
    assert first["surrogate"] == second["question"] and third["surrogate"] == third["question"]


def test_a_long_sentence_is_cut_around_its_answer(tmp_path):
    text = f"It {'was a long way and ' * 12}then came Corwin the tall {'and then it went on ' * 12}to the end."
    question = {"question": "Who came then?", "answers": ["Corwin the tall"], "evidence": [[0, len(text)]]}
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text, "questions": [question]}), "utf-8")
    (document,) = texts_to_remember(0, 1, [str(tmp_path / "one.jsonl")])
    (clue,) = document["questions"][0]["clues"]
    assert "Corwin the tall" in clue and clue in text and len(clue) <= 170


def test_documents_without_answers_to_find_are_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text(json.dumps({"text": "Nothing.", "questions": []}), "utf-8")
    with pytest.raises(TrainingError, match="no answer was found"):
        texts_to_remember(0, 1, [str(tmp_path / "none.jsonl")])
    one = {"text": "Corwin sailed.", "questions": [{"question": "Who?", "answers": ["Corwin"], "evidence": [[0, 14]]}]}
    (tmp_path / "one.jsonl").write_text(json.dumps(one), "utf-8")
    with pytest.raises(TrainingError, match="give larger"):
        questions_on_passages(0, 3, [str(tmp_path / "one.jsonl")], characters=(3,))


def test_the_examples_train_with_the_trainer_that_is_shipped(file, tmp_path):
    import random

    from transformers import AutoTokenizer

    from memory_worker.models.embedded import FOLDER
    from memory_worker.training.config import DataConfig, StageConfig
    from memory_worker.training.data import Source

    tokenizer = AutoTokenizer.from_pretrained(Path(FOLDER))
    arguments = {"files": [file], "characters": [110], "summaries": 0, "short": 0}
    data = DataConfig(kind="conversations", generator="examples.readings:questions_on_passages", arguments=arguments)
    stage = StageConfig(name="any", data=(data,), steps=1, texts=1, questions=6, tokens=2000)
    (example,) = Source(data, tokenizer).examples(random.Random(1), 1, stage, 2000)
    assert len(example.tails) > 1 and "[1] Mr. Hale" in tokenizer.decode(example.text)
