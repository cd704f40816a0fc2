"""The command line without a server: usage, errors, output shapes, speed. With one: tests/system/."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from serving.cli.show import Output
from serving.client.client import Event
from tests.support.answers import ANSWER, PASSAGE

MEMORAG = Path(sys.executable).with_name("memorag")
COMMANDS = ["up", "down", "status", "memorize", "ask", "summarize", "memories", "evaluate", "doctor"]


def memorag(*arguments: str | Path, storage: Path, **environment: str) -> subprocess.CompletedProcess:
    cleared = {k: v for k, v in os.environ.items() if not k.startswith("MEMORAG_")}
    environment = cleared | {"MEMORAG_STORAGE": str(storage), "COLUMNS": "200"} | environment
    return subprocess.run([MEMORAG, *arguments], capture_output=True, text=True, env=environment)


def test_help_is_fast_and_names_every_command(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = memorag("--help", storage=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(f" {command} " in shown.stdout for command in COMMANDS), shown.stdout
    # 0.3 s of processor time when measured; a process that imports torch or ray takes several seconds of it.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize(
    "module", ["serving", "serving.cli.main", "serving.client.client", "serving.deploy.daemon", "serving.deploy.doctor"]
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = {"torch", "ray", "vllm", "faiss", "pyarrow", "numpy"}
    code = f"import sys, {module}; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("command", [["ask"], ["ask", "m"], ["memorize"], ["ask", "m", "q", "--task", "x"], ["bogus"],
                                     ["up", "--port", "70000"], ["memorize", "no-such-file.txt"]])  # fmt: skip
def test_wrong_usage_exits_2(command: list[str], tmp_path: Path) -> None:
    done = memorag(*command, storage=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["ask", "m", "q"], ["summarize", "m"], ["memories"], ["memories", "show", "m"],
                                     ["memories", "delete", "m"]])  # fmt: skip
def test_no_server_is_one_line_with_the_fix(command: list[str], tmp_path: Path) -> None:
    done = memorag(*command, "--json", storage=tmp_path, MEMORAG_URL="http://127.0.0.1:9")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no server answers at http://127.0.0.1:9; start one with 'memorag up'")
    assert done.stderr.count("\n") == 1


def test_a_misspelt_profile_is_said_at_once(tmp_path: Path) -> None:
    done = memorag("up", "--profile", "embeded", storage=tmp_path)
    assert done.returncode == 1 and "'embedded'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "server.log").exists()


def test_down_and_status_without_a_server(tmp_path: Path) -> None:
    assert json.loads(memorag("down", "--json", storage=tmp_path).stdout) == {"stopped": False}
    done = memorag("down", storage=tmp_path)
    assert done.returncode == 0 and "no server was running" in done.stdout
    done = memorag("status", "--json", storage=tmp_path)
    assert done.returncode == 1 and json.loads(done.stdout) == {"running": False, "storage": str(tmp_path)}


def test_doctor_as_json(tmp_path: Path) -> None:
    done = memorag("doctor", "--port", "0", "--json", storage=tmp_path)
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == int(any(check["state"] == "fail" for check in checks))
    assert {"python", "vllm", "/dev/shm", "gpus"} <= {check["name"] for check in checks}


def test_an_answer_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).answer(ANSWER | {"answer": "twice [1] [bold]not markup[/bold]"})
    shown = capsys.readouterr().out
    for part in ("span: 门 gate", "[1] a 0-4  0.5000  gate", "twice [1] [bold]not markup[/bold]", "[1] a 0-4",
                 "its words are noise; passages and evidence are real", "recall 1 ms, retrieve 2 ms"):  # fmt: skip
        assert part in shown, shown
    assert "\x1b" not in shown


def test_a_streamed_answer_shows_the_same_parts(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [Event("token", {"text": text}) for text in ("twi", "ce [1]")]
    stream = [Event("clue", ANSWER["clues"][0]), Event("passage", PASSAGE), *tokens, Event("done", ANSWER)]
    Output(as_json=False).stream(iter(stream))
    streamed = capsys.readouterr().out
    Output(as_json=False).answer(ANSWER)
    assert streamed == capsys.readouterr().out


def test_json_output_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.note("beside")
    out.answer(ANSWER)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == ANSWER and "beside" in captured.err
