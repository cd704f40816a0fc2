"""Batches against the real server: kills half way, counted at the Router; failures as rows; folders of files."""

import http
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.processes import title_of
from tests.support.server import MEMORAG, ROOT, Server, memorize
from tests.support.waiting import wait_until

QUESTIONS = 80


@pytest.fixture(scope="module")
def memories(server: Server) -> Iterator[list[str]]:
    names = ["batch-harbour", "batch-mill"]
    for name in names:
        text = f"The {name} was built in 1804 by Ada Finch. " + "Nobody knows who painted its door. " * 20
        memorize(server, [{"id": "d", "text": text}], id=name)
    yield names
    delete(server, names)


def delete(server: Server, names: Iterable[str]) -> None:
    with server.client() as client:
        for name in names:
            assert client.delete(f"/v1/memories/{name}").status_code == 204


def start(server: Server, *arguments: str | Path) -> subprocess.Popen:
    environment = os.environ | {"MEMORAG_STORAGE": str(server.storage), "NO_COLOR": "1"}
    environment.pop("MEMORAG_URL", None)
    return subprocess.Popen([MEMORAG, *arguments], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)


def recorded(output: Path) -> int:
    """Files that hold answers at this moment; each has at least one row."""
    return len(list(output.rglob("*.parquet")))


def ids(output: Path) -> set[str]:
    """Of the questions whose rows are on the disk."""
    return {id for path in output.rglob("*.parquet") for id in pq.read_table(path, columns=["id"])["id"].to_pylist()}


def run_process(server: Server) -> psutil.Process | None:
    """The process of the batch run that is under way."""
    return next((p for p in server.processes() if "BatchRun" in title_of(p)), None)


@pytest.mark.long
def test_killed_half_way_nothing_is_lost_or_asked_twice(server, memories, tmp_path):
    questions, output = tmp_path / "questions.jsonl", tmp_path / "answers"
    rows = [
        {"id": f"q{n}", "memory": memories[n % 2], "question": f"Who built it, asked {n} times?", "max_tokens": 4,
         "task": "rag" if n % 5 else "memorag"}
        for n in range(QUESTIONS)
    ]  # fmt: skip
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["batch", questions, output, "--concurrency", "4", "--rows-per-part", "30"]
    client = start(server, *command)
    wait_until(lambda: recorded(output) >= 5)
    client.kill()
    client.wait()
    left = run_process(server)
    assert left is not None, "the run goes on without its client"
    seen = recorded(output)
    wait_until(lambda: recorded(output) > seen)
    left.send_signal(signal.SIGKILL)
    psutil.wait_procs([left])
    assert 5 < len(ids(output)) < QUESTIONS - 4, "it was killed half way"
    report = json.loads(server.memorag(*map(str, command), "--json").stdout)
    assert (report["state"], report["total"], report["failed"], report["error"]) == ("done", QUESTIONS, 0, None)
    assert report["already"] + report["answered"] == QUESTIONS, report
    assert report["begun"] == QUESTIONS, "what the Router counted, over all of it"
    table = pq.read_table(output)
    assert Counter(table["id"].to_pylist()) == Counter(row["id"] for row in rows)
    assert all(table["answer"].is_valid().to_pylist()) and table["error"].null_count == QUESTIONS
    assert len(list(output.glob("part-*.parquet"))) == report["parts"] == 3
    wait_until(lambda: run_process(server) is None)


def test_what_fails_is_a_row(server, memories, tmp_path):
    """From an Arrow table, in Python; the run's other questions are answered."""
    table = pa.table(
        {
            "id": ["good", "strange", "empty", "twin", "twin", "bad"],
            "memory": [memories[0], "no-such-memory", memories[1], memories[1], memories[1], memories[0]],
            "question": ["Who built it?", "Who?", "", "When was it built?", "Was it built?", "Who?"],
            "task": ["rag", None, None, "rag", "rag", "guess"],
            "gold": ["Ada"] * 6,
        }
    )
    pq.write_table(table, tmp_path / "table.parquet")
    script = (
        "import sys, json, pyarrow.parquet as pq; from serving.batch.answer import answer_all\n"
        "from dataclasses import asdict; table, out, storage = sys.argv[1:]\n"
        "seen = []; report = answer_all(pq.read_table(table), out, storage=storage, group_by_memory=False, "
        "progress=lambda *counts: seen.append(counts))\n"
        "print(json.dumps([asdict(report), seen[-1]]))"
    )
    command = [sys.executable, "-c", script, tmp_path / "table.parquet", tmp_path / "out", server.storage]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report, counts = json.loads(done.stdout.splitlines()[-1])  # Ray may have said something before
    assert report["errors"] == {"404 Not Found": 1, f"422 {http.HTTPStatus(422).phrase}": 3}, report
    assert (report["answered"], report["failed"], report["ignored"]) == (2, 4, ["gold"])
    assert report["begun"] == 3 and counts == [6, 6, 0], "rows that are no question never reach a Router"
    found = {(row["id"], row["question"]): row["error"] for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert found["good", "Who built it?"] is None and found["twin", "When was it built?"] is None
    assert "no-such-memory" in found["strange", "Who?"]["detail"]
    assert "has the id 'twin'" in found["twin", "Was it built?"]["detail"]


@pytest.mark.long
def test_mistakes_are_said_in_one_line(server, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "1", "question": "Who?"}) + "\n")
    for arguments, words in (
        ((tmp_path / "none.parquet", tmp_path / "out"), "is not there"),
        ((tmp_path / "q.jsonl", tmp_path / "out"), "no column memory"),
    ):
        done = server.memorag("batch", *map(str, arguments), "--json", check=False)
        assert done.returncode == 1 and done.stdout == "" and words in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    done = server.memorag("batch", str(tmp_path / "q.jsonl"), "out", "--storage", str(tmp_path), check=False)
    assert done.returncode == 1 and "start one with 'memorag up'" in done.stderr


@pytest.mark.long
def test_a_folder_of_files_is_memorized_and_a_killed_run_goes_on(server, tmp_path):
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    for n in range(6):
        (folder / "deep" / f"bulk-{n}.txt").write_text(f"House number {n} was sold in {1800 + n}. " * 30)
    (folder / "wrong.txt").write_bytes(b"\xff\xfe\xfa not UTF-8")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    command = ["memorize", "--recursive", folder, "--concurrency", "2", "--tag", "bulk"]
    client = start(server, *command)

    def made() -> set[str]:
        with server.client() as http:
            return {m["id"] for m in http.get("/v1/memories", params={"tag": "bulk"}).json()["memories"]}

    wait_until(lambda: len(made()) >= 2)
    client.kill()
    client.wait()
    done = server.memorag(*map(str, command), "--json", check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["made"] + report["there"] == 6 and report["there"] >= 2 and report["other"] == 1
    (wrong,) = [file for file in report["files"] if file["state"] == "failed"]
    assert wrong["file"] == "wrong.txt" and "not UTF-8" in wrong["error"] and "failed: wrong.txt" in done.stderr
    assert made() == {f"deep--bulk-{n}.txt" for n in range(6)}
    delete(server, made())
