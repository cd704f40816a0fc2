"""Batch runs without a cluster: what is recorded, what the Routers keep, which rows are questions, files' ids."""

import asyncio
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving import api
from serving.batch.answers import ANSWERS, Answers, make_answer_row, make_failure_row
from serving.batch.job import BatchError, BatchReport
from serving.batch.memorize import memorize_folder, memory_id
from serving.batch.progress import Rate
from serving.batch.questions import BatchQuestion, _check_columns, _conform, questions_in, questions_of
from serving.batch.run import _check
from serving.client.client import Memory
from serving.errors import ProblemError
from serving.router.once import KeyedAnswers

QUESTIONS = [BatchQuestion(f"q{n}", f"memory-{n % 3}", f"What is {n}?") for n in range(10)]


def answer_to(question: BatchQuestion, text: str = "An answer.") -> api.Answer:
    quoted = {"memory": question.memory, "document": "d", "start": 0, "end": 4, "text": "gate", "score": 0.5}
    return api.Answer(
        memory=question.memory,
        version="v000001-00000001",
        memories=[api.MemoryVersion(id=question.memory, version="v000001-00000001")],
        task="memorag",
        answer=text,
        citations=[{"n": 1, "memory": question.memory, "document": "d", "start": 0, "end": 4}],
        evidence=[quoted],
        clues=[{"kind": "span", "text": "门 gate"}],
        passages=[quoted],
        degraded=[],
        usage=api.Usage(prompt_tokens=3),
        timings_ms=api.Timings(total=1.5),
    )


def rows(folder) -> list[dict]:
    return pq.read_table(folder).to_pylist()


def test_rows_come_back_as_they_were_answered(tmp_path):
    first, second = QUESTIONS[:2]
    answers = Answers(str(tmp_path / "out"), "default", rows_per_part=100)
    answers.record(
        [make_answer_row(first, answer_to(first)), make_failure_row(second, ProblemError(404, "no such memory"))]
    )
    assert not list((tmp_path / "out").glob("part-*"))
    answers.fold()
    table = pq.read_table(tmp_path / "out")
    assert table.schema.equals(ANSWERS)
    good, bad = table.to_pylist()
    assert good["id"] == "q0" and good["error"] is None and good["task"] is None
    assert good["passages"] == [p.model_dump() for p in answer_to(first).passages]
    assert good["clues"] == [{"kind": "span", "text": "门 gate"}] and good["usage"]["prompt_tokens"] == 3
    assert bad["error"] == {"status": 404, "title": "Not Found", "detail": "no such memory"} and bad["answer"] is None
    assert questions_in(table) == [first, second]


def test_cut_short_anywhere_no_row_is_lost_or_doubled(tmp_path):
    """The folder as it is after each write and each deletion is one that a kill may leave."""
    states = []

    class Watched(Answers):
        def _write(self, path, table):
            super()._write(path, table)
            states.append(shutil.copytree(tmp_path / "out", tmp_path / f"state-{len(states)}"))

    answers = Watched(str(tmp_path / "out"), "default", rows_per_part=4)
    done = []
    for start in range(0, 10, 2):
        batch = QUESTIONS[start : start + 2]
        answers.record([make_answer_row(question, answer_to(question)) for question in batch])
        done.append({question.key for question in QUESTIONS[: start + 2]})
    answers.fold()
    for state in states:
        (state / "part-00009.parquet.0123456789abcdef0123456789abcdef.tmp").write_bytes(b"torn")
        again = Answers(str(state), "default", rows_per_part=4)
        assert again.keys in done, "exactly what was recorded when the state was taken"
        assert again.run == answers.run
        left = [question for question in QUESTIONS if question.key not in again.keys]
        again.record([make_answer_row(question, answer_to(question)) for question in left])
        again.fold()
        assert sorted(row["id"] for row in rows(state)) == sorted(question.id for question in QUESTIONS)
    assert len(states) == 8 and len(rows(tmp_path / "out")) == 10 and answers.parts == 3


def test_a_folder_of_something_else_or_of_another_tenant_is_left_alone(tmp_path):
    Answers(str(tmp_path / "out"), "acme", 10)
    with pytest.raises(BatchError, match="tenant 'acme', not 'default'"):
        Answers(str(tmp_path / "out"), "default", 10)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part-00000.parquet").write_bytes(b"mine")
    with pytest.raises(BatchError, match=r"holds part-00000.parquet.*choose a new or empty folder"):
        Answers(str(tmp_path / "other"), "default", 10)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["part-00000.parquet"]


def test_failed_rows_can_be_asked_again(tmp_path):
    answers = Answers(str(tmp_path), "default", rows_per_part=2)
    good, *bad = QUESTIONS[:4]
    answers.record([make_failure_row(question, ProblemError(503, "not now")) for question in bad])
    answers.record([make_answer_row(good, answer_to(good))])
    assert answers.drop_failed() == 3
    assert Answers(str(tmp_path), "default", 2).keys == {good.key}
    assert [row["id"] for row in rows(tmp_path)] == ["q0"]


class CountingRouter(KeyedAnswers):
    """Answers when it is let; counts what it began."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.let = asyncio.Event()
        self.broken = False

    async def answer(self, tenant, memories, tag, question):
        self.asked.append(question.question)
        await self.let.wait()
        if self.broken:
            raise ProblemError(503, "not now")
        return answer_to(BatchQuestion("q", memories[0], question.question), question.question)

    def ask(self, text: str, run: str = "run"):
        return self.answer_once(run, text, "default", ["m"], api.Question(question=text))


async def test_a_question_asked_again_is_answered_once():
    router = CountingRouter()
    first, second = asyncio.create_task(router.ask("a")), asyncio.create_task(router.ask("a"))
    other_run = asyncio.create_task(router.ask("a", "another"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()  # its asker was killed
    kept = asyncio.create_task(router.kept_answers("run"))
    router.let.set()
    assert (await second).answer == "a" and [(key, a.answer) for key, a in await kept] == [("a", "a")]
    assert (await router.ask("a")).answer == "a"
    await other_run
    assert router.asked == ["a", "a"] and router.begun("run") == router.begun("another") == 1


async def test_a_failure_is_not_kept():
    router = CountingRouter()
    router.broken = True
    router.let.set()
    for _ in range(2):
        with pytest.raises(ProblemError, match="not now"):
            await router.ask("a")
    router.broken = False
    assert (await router.ask("a")).answer == "a"
    assert router.begun("run") == 3 and len(await router.kept_answers("run")) == 1


async def test_only_the_newest_answers_are_kept(monkeypatch):
    monkeypatch.setattr("serving.router.once._KEPT", 3)
    router = CountingRouter()
    waiting = [asyncio.create_task(router.ask(f"early {n}")) for n in range(4)]
    await asyncio.sleep(0)
    router.let.set()
    await asyncio.gather(*waiting)  # what is in flight is never dropped
    for n in range(5):
        await router.ask(f"late {n}")
    assert [key for key, _ in await router.kept_answers("run")] == ["late 2", "late 3", "late 4"]


def test_rows_that_are_no_questions():
    for row, words in (
        (BatchQuestion("", "m", "What?"), "no id"),
        (BatchQuestion("q", "", "What?"), "no memory"),
        (BatchQuestion("q", "m", ""), "question"),
        (BatchQuestion("q", "m", "What?", task="guess"), "task"),
        (BatchQuestion("q", "m", "What?", max_tokens=0), "max_tokens"),
        (BatchQuestion("q", "m", "What?", language="fr"), "language"),
    ):
        with pytest.raises(ProblemError, match=words) as raised:
            _check(row)
        assert raised.value.status == 422
    assert _check(BatchQuestion("q", "m", "What?", "rag", 7, "zh")).max_tokens == 7
    assert _check(BatchQuestion("q", "m", "", "summarize")).task == "summarize"


def test_columns_are_cast_filled_and_checked():
    table = pa.table({"id": [1, 2], "memory": ["a", None], "question": ["x", "y"], "max_tokens": [5.0, None]})
    first, second = questions_in(_conform(table))
    assert first == BatchQuestion("1", "a", "x", None, 5) and second == BatchQuestion("2", "", "y")
    assert first.key != second.key == BatchQuestion("2", "", "y").key
    assert _check_columns(["id", "memory", "question", "gold"]) == ["gold"]
    with pytest.raises(BatchError, match="no column memory"):
        _check_columns(["id", "question"])
    with pytest.raises(BatchError, match="did you mean 'max_tokens'"):
        _check_columns(["id", "memory", "question", "max_token"])


def test_where_questions_lie(tmp_path):
    (tmp_path / "q").mkdir()
    with pytest.raises(BatchError, match="has no such file"):
        questions_of(tmp_path / "q", "unused")
    (tmp_path / "q" / "a.jsonl").write_text(json.dumps({"id": "1"}))
    assert questions_of(tmp_path / "q", "unused") == str(tmp_path / "q")
    with pytest.raises(BatchError, match="is not there"):
        questions_of(tmp_path / "none.parquet", "unused")
    table = pa.table({"id": ["1"], "memory": ["m"], "question": ["What?"]})
    kept = questions_of(table, str(tmp_path / "out"))
    assert pq.read_table(kept).equals(table) and kept == questions_of(table, str(tmp_path / "out"))
    Answers(str(tmp_path / "out"), "default", 10)  # a table beside the answers is no stranger there


@pytest.mark.parametrize("also", [
    {"failed_change": {"kind": "put", "version": "v2", "error": "it was cancelled"}},
    {"error": "it was cancelled"},
    {"job": {"kind": "put", "version": "v2"}},
])  # fmt: skip
def test_a_file_whose_memory_is_ready_is_there_whatever_became_of_its_last_change(tmp_path, also):
    (tmp_path / "book.txt").write_text("the gate")

    class Client:
        def memory(self, id):
            return Memory(self, {"id": id, "status": "ready", "version": "v1", "job": None} | also)

    report = memorize_folder(Client(), tmp_path)
    assert [(file.file, file.state, file.error) for file in report.files] == [("book.txt", "there", None)]


def test_every_file_has_an_id_of_its_own():
    names = ["a.txt", "b/a.txt", "b--a.txt", "b-a.txt", "b/A.txt", "书.txt", "書.txt", "a b.txt", "a-b.txt", "x" * 300,
             "x" * 301, "deep/er/a.md"]  # fmt: skip
    ids = [memory_id(name) for name in names]
    assert len(set(ids)) == len(names) and all(len(id) <= 128 and not id.startswith(".") for id in ids)
    assert ids[:2] == ["a.txt", "b--a.txt"] and ids[-1] == "deep--er--a.md"


def test_progress_says_rate_and_time_left():
    seconds = iter([0.0, 100.0, 110.0])
    rate = Rate(lambda: next(seconds))
    assert rate.note(0, 0, 0, "questions") == "0 of 0 questions"
    assert rate.note(40, 1000, 40, "questions") == "40 of 1,000 questions"
    assert rate.note(60, 1000, 40, "questions") == "60 of 1,000 questions, 2.00/s, 7:50 left"
    assert BatchReport(answered=6, failed=2, seconds=4.0).rate == 2.0
