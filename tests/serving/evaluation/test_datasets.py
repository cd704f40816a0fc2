"""Each published format, by tiny files of its fields."""

import json
import lzma

import pytest

from serving.evaluation.datasets import DatasetError, read_examples


def write(path, records, array=False):
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    text = json.dumps(records) if array else lines
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


SPANS = {
    "id": "town", "title": "Town", "language": "zh", "text": "门在三月打开。",
    "questions": [
        {"question": "门何时打开？", "answers": ["三月"], "evidence": [[0, 7]]}, {"question": "谁？", "answers": []}
    ],
}  # fmt: skip
LONGBENCH = {
    "input": "Who opened it?", "context": "The keeper opened it.", "answers": ["the keeper", "Ann"], "length": 5,
    "dataset": "hotpotqa_e", "language": "en", "all_classes": None, "_id": "a1",
}  # fmt: skip


def test_spans(tmp_path):
    first, second = read_examples(write(tmp_path / "town.jsonl.xz", [SPANS]))
    assert (first.id, second.id, first.task, first.metric, first.language) == ("town/0", "town/1", "town", "f1", "zh")
    assert first.evidence == ((0, 7),) and second.evidence == () and first.answers == ("三月",)
    assert first.text is second.text and first.document == second.document


def test_longbench(tmp_path):
    summary = LONGBENCH | {"dataset": "gov_report", "input": "", "_id": "g"}
    classes = LONGBENCH | {"dataset": "trec", "all_classes": ["Food", "Person"], "answers": ["Person"], "_id": "t"}
    code = LONGBENCH | {"dataset": "lcc"}
    read = read_examples(write(tmp_path / "test.json", [LONGBENCH, summary, classes, code], array=True))
    assert [(e.id, e.metric, e.question) for e in read] == [
        ("hotpotqa/a1", "f1", "Who opened it?"), ("gov_report/g", "rouge-l", ""), ("trec/t", "class", "Who opened it?")
    ]  # fmt: skip
    assert read[2].classes == ("Food", "Person") and read[0].answers == ("the keeper", "Ann")
    assert [e.task for e in read_examples(tmp_path / "test.json", ["trec"])] == ["trec"]
    with pytest.raises(DatasetError, match="no part trek; it has gov_report, hotpotqa, trec"):
        read_examples(tmp_path / "test.json", ["trek"])


def test_longbench_v2(tmp_path):
    record = {f"choice_{letter}": f"option {letter}" for letter in "ABCD"} | {
        "_id": "6", "domain": "Single-Document QA", "question": "Which?", "answer": "C", "context": "Text.",
        "difficulty": "hard", "length": "short", "sub_domain": "Legal",
    }  # fmt: skip
    (example,) = read_examples(write(tmp_path / "data.json", [record], array=True))
    assert (example.task, example.metric, example.answers) == ("Single-Document QA", "choice", ("C",))
    assert example.question.splitlines()[:4] == ["Which?", "A. option A", "B. option B", "C. option C"]


def test_infinitebench(tmp_path):
    base = {"id": 3, "context": "A book.", "input": "Who?", "answer": ["Ann"], "options": []}
    files = {
        "longbook_qa_eng": base, "longbook_sum_eng": base, "code_run": base, "passkey": base | {"answer": "71432"},
        "longbook_choice_eng": base | {"options": ["Bob", "Ann", "Eve", "Joe"]},
        "longbook_qa_chn": base,
    }  # fmt: skip
    for name, record in files.items():
        write(tmp_path / f"{name}.jsonl", [record])
    read = {example.task: example for example in read_examples(tmp_path)}
    assert set(read) == set(files) - {"code_run"}
    assert read["longbook_choice_eng"].answers == ("B",) and "D. Joe" in read["longbook_choice_eng"].question
    assert read["longbook_sum_eng"].question == "" and read["longbook_sum_eng"].metric == "rouge-l"
    assert read["longbook_qa_chn"].language == "zh" and read["passkey"].metric == "contains"
    assert len({example.document for example in read.values()}) == 1


def test_ultradomain(tmp_path):
    record = {
        "input": "Why?",
        "context": "Law.",
        "answers": ["So."],
        "_id": "u",
        "label": "legal",
        "length": 2,
        "meta": {},
    }
    (example,) = read_examples(write(tmp_path / "legal.jsonl", [record]))
    assert (example.id, example.task, example.metric) == ("legal/u", "legal", "f1")


def test_leval(tmp_path):
    record = {"input": "A lecture.", "instructions": ["Which? A. x B. y", "Name it."], "outputs": ["B", "Entropy"]}
    write(tmp_path / "coursera.jsonl", [record | {"evaluation": "exam", "source": "coursera"}])
    write(tmp_path / "tv_show_summ.jsonl", [record | {"evaluation": "rouge", "source": "tv"}])
    write(tmp_path / "gsm100.jsonl", [record | {"evaluation": "exam", "source": "gsm"}])
    read = read_examples(tmp_path)
    assert [(e.id, e.metric) for e in read] == [
        ("coursera/0/0", "choice"), ("coursera/0/1", "contains"),
        ("tv_show_summ/0/0", "rouge-l"), ("tv_show_summ/0/1", "rouge-l"),
    ]  # fmt: skip


def test_repeated_ids_are_told_apart(tmp_path):
    read = read_examples(write(tmp_path / "x.jsonl", [LONGBENCH, LONGBENCH]))
    assert [example.id for example in read] == ["hotpotqa/a1", "hotpotqa/a1#2"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"foo": 1}\n', "has the fields foo"),
        ("a.jsonl", "{nonsense\n", "cannot be read: JSONDecodeError"),
        ("a.jsonl", "", "has no questions"),
        ("a.jsonl.xz", "not xz", "cannot be read: LZMAError"),
        ("a.jsonl", json.dumps(LONGBENCH | {"dataset": "lcc"}), "has no questions on a text"),
        ("a.jsonl", json.dumps(SPANS | {"questions": [{"q": 1}]}), "cannot be read: KeyError"),
    ],
)
def test_files_that_cannot_be_asked(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=words):
        read_examples(tmp_path / name)
