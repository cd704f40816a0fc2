"""A run against a small HTTP server: each text memorized once, nothing asked twice, the same rows every time."""

import http.server
import json
import threading
from collections import Counter
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from serving import MemoRAG
from serving.cli.main import app
from serving.client.errors import ServerUnreachable
from serving.evaluation.evaluate import ask_all, sample
from serving.evaluation.report import report, report_svg
from serving.evaluation.run import EvaluationError, Run, fingerprint
from tests.support.examples_of_questions import TEXT, example

EXAMPLES = [
    example("a/0", "a", evidence=((0, 25),)),
    example("b/0", "b", text=TEXT + " ", question="What is bread?", answers=("two coins",), evidence=((26, 48),)),
    example("a/1", "a", question="Who sleeps?", answers=("the keeper",), evidence=((49, 67),)),
]
METHODS = ["memorag", "rag", "passages"]


class Server:
    """Knows one answer; finds the first sentence, and with clues the second too. Counts what it is asked."""

    def __init__(self):
        self.asked = Counter()
        self.memories = set()
        self.refuse = set()  # questions
        self.also: dict = {}  # what is said of every memory beside
        self.answer = "In March [1]."
        self.phrases = Counter()  # whether a phrase was asked for
        state = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = unquote(self.path.rpartition("/")[2])
                self.say(
                    *(
                        (200, ready(name) | state.also)
                        if name in state.memories
                        else (404, {"detail": "none", "status": 404})
                    )
                )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/v1/memories":
                    state.asked["memorize"] += 1
                    state.memories.add(body["id"])
                    return self.say(202, ready(body["id"]))
                task = body.get("task", "passages")
                state.asked[task, body["question"]] += 1
                state.phrases[body.get("short", False)] += 1
                if body["question"] in state.refuse:
                    return self.say(422, {"title": "No", "status": 422, "detail": "too hard"})
                found = [{"start": 0, "end": 25, "score": 0.5}]
                if task == "memorag":
                    found.insert(0, {"start": 26, "end": 48, "score": 0.9})
                if task == "passages":
                    return self.say(200, {"passages": found})
                rest = {name: [] for name in ("citations", "evidence", "degraded")}
                clues = [{"kind": "span", "text": "two coins"}] if task == "memorag" else []
                self.say(200, rest | {
                    "answer": state.answer, "clues": clues, "passages": found, "usage": {"prompt_tokens": 7},
                    "timings_ms": {"recall": 1, "retrieve": 1, "generate": 1, "total": 3},
                })  # fmt: skip

            def say(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


def ready(name):
    return {"id": name, "status": "ready", "kind": "beacon", "job": None, "error": None}


@pytest.fixture
def server():
    state = Server()
    yield state
    state.http.shutdown()
    state.http.server_close()


def go(server, folder, methods=METHODS, concurrency=2):
    run = Run(folder, {"questions": fingerprint(EXAMPLES)})
    with MemoRAG(server.url) as client:
        ask_all(client, run, sample(EXAMPLES, None), methods, max_tokens=8, concurrency=concurrency)
    return run


def test_each_text_is_memorized_once_and_nothing_is_asked_twice(server, tmp_path):
    first = go(server, tmp_path)
    assert server.asked["memorize"] == 2 and all(count == 1 for key, count in server.asked.items() if key != "memorize")
    assert len(first.rows) == 9
    asked = server.asked.copy()
    assert go(server, tmp_path).rows == first.rows and server.asked == asked
    go(server, tmp_path, [*METHODS, "full"])
    assert server.asked.total() == asked.total() + 3 and server.asked["full", "Who sleeps?"] == 1


@pytest.mark.parametrize("also", [
    {"failed_change": {"kind": "put", "version": "v2", "error": "it was cancelled"}},
    {"error": "it was cancelled"},
    {"job": {"kind": "put", "state": "running", "version": "v2", "done_tokens": 0, "total_tokens": 9, "documents": []}},
])  # fmt: skip
def test_a_ready_memory_is_asked_whatever_became_of_its_last_change(server, tmp_path, also):
    go(server, tmp_path)
    server.also = also
    (tmp_path / "rows.jsonl").unlink()
    assert len(go(server, tmp_path).rows) == len(EXAMPLES) * len(METHODS) and server.asked["memorize"] == 2


def test_what_failed_is_asked_again(server, tmp_path):
    server.refuse.add("Who sleeps?")
    errors = [row["error"] for row in go(server, tmp_path).rows if "error" in row]
    assert errors == ["422 too hard"] * 3
    server.refuse.clear()
    before = server.asked.copy()
    run = go(server, tmp_path)
    assert server.asked.total() == before.total() + 3 and len(run.rows) == 9
    assert not [row for row in run.rows if "error" in row]


def test_a_line_that_was_being_written_is_asked_again(server, tmp_path):
    whole = go(server, tmp_path).rows
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    before = server.asked.copy()
    assert go(server, tmp_path).rows == whole and server.asked.total() == before.total() + 1
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_server_that_goes_away_ends_the_run_and_not_what_was_answered(server, tmp_path):
    rows = go(server, tmp_path, ["rag"]).rows
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ServerUnreachable):
        go(server, tmp_path)
    assert Run(tmp_path, {"questions": fingerprint(EXAMPLES)}).rows == rows


def test_a_folder_has_one_run(tmp_path):
    Run(tmp_path, {"questions": "x", "max_tokens": 8})
    Run(tmp_path, {"questions": "x", "max_tokens": 8})
    with pytest.raises(EvaluationError, match="another max_tokens; use another folder"):
        Run(tmp_path, {"questions": "x", "max_tokens": 9})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(EvaluationError, match="damaged"):
        Run(tmp_path, {"questions": "x", "max_tokens": 8})


def test_a_sample_is_spread_evenly_and_keeps_texts_together():
    many = [example(f"{n}", "even" if n % 2 == 0 else "odd") for n in range(100)]
    assert [int(e.id) for e in sample(many, 4)] == [0, 50, 25, 75]
    assert sample(many, 4) == sample(many, 4) and len(sample(many, 1000)) == 100


def test_figures_worked_out_by_hand(server, tmp_path):
    server.refuse.add("Who sleeps?")
    rows = go(server, tmp_path).rows
    found = report(EXAMPLES, rows, METHODS)
    figures, gains = found["parts"]["t"], found["differences"]["t"]
    assert list(found["parts"]) == ["t"] and found["baseline"] == "rag"
    # One answer of three is right; the question that failed counts as wrong.
    assert figures["f1"]["rag"]["mean"] == pytest.approx(1 / 3) == figures["exact"]["memorag"]["mean"]
    assert "passages" not in figures["f1"] and figures["f1"]["rag"]["n"] == 3
    # Alone the question finds the first sentence; the clue puts the second before it.
    assert figures["evidence@1"]["rag"]["mean"] == figures["evidence@1"]["passages"]["mean"] == pytest.approx(1 / 3)
    assert figures["answer@1"]["memorag"]["mean"] == pytest.approx(1 / 2), "'the keeper' is not in the text"
    assert gains["evidence@1"]["memorag"]["mean"] == pytest.approx(0) and gains["f1"]["memorag"]["mean"] == 0
    assert "evidence@3" not in figures, "no answer had three passages"
    costs = found["methods"]
    assert costs["rag"]["failed"] == 1 and costs["memorag"]["clues"] == 1 and costs["rag"]["ms_median"] == 3
    assert costs["rag"]["tokens"] == 7 and costs["rag"]["kinds"] == ["beacon"] and costs["passages"]["tokens"] is None
    assert report(EXAMPLES, rows, METHODS) == found
    picture = report_svg("town & gate", figures)
    assert picture.startswith("<svg") and "town &amp; gate" in picture and picture.count("<circle") == 10


def test_parts_have_figures_of_their_own(server, tmp_path):
    rows = go(server, tmp_path, ["memorag"]).rows
    parts = [example(e.id, e.document, task=f"part {e.document}", evidence=e.evidence) for e in EXAMPLES]
    found = report(parts, rows, ["memorag"])
    assert list(found["parts"]) == ["part a", "part b", "all"] and found["baseline"] == "memorag"
    assert found["parts"]["part b"]["evidence@1"]["memorag"] == {"mean": 1.0, "low": None, "high": None, "n": 1}
    assert found["differences"]["all"] == {}


def test_the_command_from_file_to_report(server, tmp_path, monkeypatch):
    text = {
        "id": "town",
        "text": TEXT,
        "questions": [{"question": "When?", "answers": ["in March"], "evidence": [[0, 25]]}],
    }
    (tmp_path / "town.jsonl").write_text(json.dumps(text) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "town.jsonl", "--url", server.url, "--tasks", "rag,memorag"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert {"report.json", "report.svg", "rows.jsonl", "run.json"} == {
        p.name for p in (tmp_path / "town-eval").iterdir()
    }
    lines = [line.split() for line in shown.output.splitlines()]
    assert ["f1", "rag", "1", "1.000"] in lines and ["evidence@1", "memorag", "1", "0.000", "-1.000"] in lines
    kept = tmp_path / "town-eval" / "storage"
    (kept / "memories").mkdir(parents=True)  # by a server of the run that was killed
    again = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert list(again["methods"]) == ["memorag", "rag"] and server.asked.total() == 3 and not kept.exists()
    assert server.phrases == {True: 2}
    refused = CliRunner().invoke(app, [*command, "--cited"])
    assert refused.exit_code == 1 and "another cited" in refused.output
    cited = json.loads(CliRunner().invoke(app, [*command[:2], "cited/", *command[2:], "--cited", "--json"]).stdout)
    assert server.phrases == {True: 2, False: 2}
    assert cited["parts"]["town"]["exact"]["rag"]["mean"] == 1, "'In March [1].' is right without its mark"
    for wrong, words in (
        (["--tasks", "rgg"], "rgg"),
        (["--part", "x"], "no part x; it has town"),
        (["--tasks", ","], ""),
    ):
        refused = CliRunner().invoke(app, [*command, *wrong])
        assert refused.exit_code in (1, 2) and words in refused.output and "Traceback" not in refused.output
