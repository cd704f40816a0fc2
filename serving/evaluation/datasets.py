"""Questions with known answers, from files as their makers publish them: one reader for each format.

Which format a file has is seen from the fields of its first record:

| format | one record | source |
|---|---|---|
| spans | a text, its questions, answers and evidence as character offsets | docs/quality.md |
| LongBench | `input context answers dataset language all_classes _id` | github.com/THUDM/LongBench |
| UltraDomain | `input context answers`, and no classes | huggingface.co/datasets/TommyChien/UltraDomain |
| LongBench v2 | `question choice_A … choice_D answer context _id` | github.com/THUDM/LongBench |
| InfiniteBench | `id context input answer options`; the file's name is the task | github.com/OpenBMB/InfiniteBench |
| L-Eval | a text `input` with `instructions outputs evaluation` | github.com/OpenLMLab/LEval |
"""

import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster.errors import MessageError

Metric = Literal["f1", "rouge-l", "choice", "contains", "class"]
Language = Literal["en", "zh"]
Record = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".jsonl.xz", ".json.xz")
_CHOOSE = {"en": "Answer with the letter of the right choice.", "zh": "请只回答正确选项的字母。"}


class DatasetError(MessageError):
    """A file that holds no questions that can be asked; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question on one text."""

    id: str  # unique in its dataset
    task: str  # the part of the dataset that figures are given for, such as narrativeqa
    text: str = field(repr=False)
    document: str  # names the text: equal texts have equal names
    question: str  # empty where a summary is wanted
    answers: tuple[str, ...]  # each of them is right
    metric: Metric
    language: Language = "en"
    evidence: tuple[tuple[int, int], ...] = ()  # characters of the text
    classes: tuple[str, ...] = ()  # what may be answered, where the metric is class


def read_examples(path: Path, parts: Sequence[str] = ()) -> list[Example]:
    """The examples of a file, or of all files of a folder; of `parts`, only those tasks. Raises `DatasetError`."""
    files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES)) if path.is_dir() else [path]
    examples = [example for file in files for example in _read_file(file)]
    known = sorted({example.task for example in examples})
    if unknown := sorted(set(parts) - set(known)):
        raise DatasetError(f"{path} has no part {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    examples = [example for example in examples if not parts or example.task in parts]
    if not examples:
        raise DatasetError(f"{path} has no questions on a text (code, counting and arithmetic are not asked)")
    return _number(examples)


def _read_file(file: Path) -> Iterator[Example]:
    stem = file.name.split(".")[0]
    texts: dict[str, str] = {}
    reader: Callable[[Record, str, int], Iterable[Example]] | None = None
    try:
        for number, record in enumerate(_records(file)):
            reader = reader or _reader(record, file)
            for example in reader(record, stem, number):
                # Many questions on one text share it in memory, too.
                yield replace(example, text=texts.setdefault(example.document, example.text))
    except (ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise DatasetError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def _records(file: Path) -> Iterator[Record]:
    """The objects of a JSON array, or one from each line."""
    open_text = lzma.open if file.suffix == ".xz" else open
    with open_text(file, "rt", encoding="utf-8") as lines:
        first = lines.read(1)
        lines.seek(0)
        if first == "[":
            yield from json.load(lines)
            return
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _reader(record: Record, file: Path) -> Callable[[Record, str, int], Iterable[Example]]:
    fields = set(record)
    for needed, reader in _READERS:
        if needed <= fields:
            return reader
    raise DatasetError(f"{file} has the fields {', '.join(sorted(fields))}, which are those of no known format")


def _spans(record: Record, stem: str, number: int) -> Iterator[Example]:
    text = str(record["text"])
    for each, item in enumerate(record["questions"]):
        yield Example(
            id=f"{record['id']}/{each}",
            task=stem,
            text=text,
            document=_name(text),
            question=item["question"],
            answers=tuple(item["answers"]),
            metric="f1",
            language="zh" if record.get("language") == "zh" else "en",
            evidence=tuple((start, end) for start, end in item.get("evidence", ())),
        )


_LONGBENCH: dict[str, Metric] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "triviaqa"), "f1"),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), "f1"),
    **dict.fromkeys(("dureader", "gov_report", "qmsum", "multi_news", "vcsum", "samsum"), "rouge-l"),
    **dict.fromkeys(("trec", "lsht"), "class"),
}


def _longbench(record: Record, stem: str, number: int) -> Iterator[Example]:
    task = str(record["dataset"]).removesuffix("_e")
    if task in _LONGBENCH:
        language: Language = "zh" if record["language"] == "zh" else "en"
        yield _example(record, f"{task}/{record['_id']}", task, _LONGBENCH[task], language, record["answers"])


def _ultradomain(record: Record, stem: str, number: int) -> Iterator[Example]:
    yield _example(record, f"{stem}/{record.get('_id', number)}", stem, "f1", "en", record["answers"])


def _longbench_v2(record: Record, stem: str, number: int) -> Iterator[Example]:
    options = [str(record[f"choice_{letter}"]) for letter in "ABCD"]
    question = _choices(str(record["question"]), options, "en")
    task = str(record.get("domain", stem))
    yield _example({**record, "input": question}, str(record["_id"]), task, "choice", "en", [record["answer"]])


_INFINITEBENCH: dict[str, Metric] = {
    "longbook_qa_eng": "f1",
    "longbook_qa_chn": "f1",
    "longbook_sum_eng": "rouge-l",
    "longbook_choice_eng": "choice",
    **dict.fromkeys(("longdialogue_qa_eng", "passkey", "number_string", "kv_retrieval"), "contains"),
}


def _infinitebench(record: Record, stem: str, number: int) -> Iterator[Example]:
    if (metric := _INFINITEBENCH.get(stem)) is None:
        return
    language: Language = "zh" if stem.endswith("_chn") else "en"
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    question, options = str(record["input"]), [str(option) for option in record["options"]]
    if metric == "choice":
        question = _choices(question, options, language)
        answers = [chr(ord("A") + options.index(answer)) for answer in answers if answer in options]
    if metric == "rouge-l":
        question = ""
    id = f"{stem}/{record['id']}"
    yield _example({**record, "input": question}, id, stem, metric, language, answers)


_LEVAL_UNASKED = {"gsm100", "codeU", "sci_fi"}  # sums, programs, and pairs of judgements
_LEVAL_METRICS: dict[str, Metric] = {"exam": "choice", "f1": "f1"}


def _leval_items(record: Record, stem: str, number: int) -> Iterator[Example]:
    if stem in _LEVAL_UNASKED:
        return
    text, metric = str(record["input"]), _LEVAL_METRICS.get(str(record["evaluation"]).lower(), "rouge-l")
    for each, (question, answer) in enumerate(zip(record["instructions"], record["outputs"], strict=True)):
        letters = metric == "choice" and str(answer).strip()[:1] in "ABCD"
        asked = f"{question}\n{_CHOOSE['en']}" if letters else str(question)
        yield Example(
            id=f"{stem}/{number}/{each}",
            task=stem,
            text=text,
            document=_name(text),
            question=asked,
            answers=(str(answer).strip(),),
            metric="contains" if metric == "choice" and not letters else metric,
        )


_READERS: tuple[tuple[set[str], Callable[[Record, str, int], Iterable[Example]]], ...] = (
    ({"text", "questions"}, _spans),
    ({"instructions", "outputs", "input", "evaluation"}, _leval_items),
    ({"question", "choice_A", "choice_D", "answer", "context"}, _longbench_v2),
    ({"input", "context", "answers", "dataset", "all_classes"}, _longbench),
    ({"input", "context", "answers"}, _ultradomain),
    ({"id", "input", "context", "answer", "options"}, _infinitebench),
)


def _example(record: Record, id: str, task: str, metric: Metric, language: Language, answers: Sequence[Any]) -> Example:
    text = str(record["context"])
    classes = tuple(record.get("all_classes") or ())
    question = str(record["input"]).strip()
    return Example(id, task, text, _name(text), question, tuple(map(str, answers)), metric, language, (), classes)


def _choices(question: str, options: Sequence[str], language: str) -> str:
    lines = [f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options)]
    return "\n".join([question, *lines, _CHOOSE[language]])


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _number(examples: Sequence[Example]) -> list[Example]:
    """Published files repeat ids; the n-th with the same gets `#n`."""
    seen: Counter[str] = Counter()
    numbered = []
    for example in examples:
        seen[example.id] += 1
        count = seen[example.id]
        numbered.append(example if count == 1 else replace(example, id=f"{example.id}#{count}"))
    return numbered
