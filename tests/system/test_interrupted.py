"""A command that starts a server or Ray of its own is interrupted at a random moment: nothing of either is left."""

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from serving.deploy import traces
from tests.support.processes import title_of
from tests.support.server import EXAMPLE, MEMORAG, ROOT
from tests.support.training_runs import tiny_run
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long  # each starts Ray, most an engine
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)


def calibrate(folder: Path) -> list[str]:
    (folder / "text.txt").write_text(EXAMPLE["text"])
    return ["calibrate", str(folder / "text.txt"), str(folder / "rates.json")]


def train(folder: Path) -> list[str]:
    run = tiny_run(folder)
    endless = run.stages[0].model_copy(update={"steps": 10**6})
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_copy(update={"stages": (endless,)}).model_dump(mode="json")))
    return ["train", str(file)]


def up(folder: Path) -> list[str]:
    return ["up", "--port", "0", "--storage", str(folder / "storage")]


# How many processes there are of a server, or a training, at most before it is interrupted: nearly all of them.
@pytest.mark.parametrize(
    ("command", "processes", "number"),
    [
        *((calibrate, 14, number) for number in SIGNALS),
        *((train, 6, number) for number in SIGNALS),
        (up, 14, random.choice(SIGNALS)),
    ],
    ids=[f"{name}-{number.name}" for name in ("calibrate", "train") for number in SIGNALS] + ["up-any"],
)
def test_nothing_is_left(command, processes: int, number: int, tmp_path: Path, interruptible: None) -> None:
    for name in ("tmp", "home"):
        (tmp_path / name).mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home")}
    enough = random.randint(1, processes)
    with (tmp_path / "said").open("w") as said:
        started = subprocess.Popen([MEMORAG, *command(tmp_path)], stdout=said, stderr=said, env=environment, cwd=ROOT)
    try:
        itself = psutil.Process(started.pid)
        folder = Path(wait_until(lambda: _watched_folder(itself)))
        wait_until(lambda: len(_find(itself, folder)) >= enough or started.poll() is not None)
        family = _find(itself, folder)
        shared = traces.shared_memory_of(family)
        assert started.poll() is None, (tmp_path / "said").read_text()
        started.send_signal(number)
        code = started.wait()
    finally:
        started.kill()
    seen = f"{enough} processes: {[title_of(each)[:60] for each in family]}\n{(tmp_path / 'said').read_text()}"
    assert code == (-number if number == signal.SIGKILL else 128 + number), seen
    wait_until(lambda: not folder.exists() and not any(psutil.pid_exists(each.pid) for each in family), lambda: seen)
    assert not traces.find_processes(folder)
    assert not [path for path in shared if Path(path).exists()], seen
    assert not list((tmp_path / "tmp").iterdir()), seen
    assert not (tmp_path / "storage" / "server.json").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A background job of a shell ignores SIGINT, one under nohup SIGHUP, and what they start would, too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _watched_folder(command: psutil.Process) -> str | None:
    """The folder of the Ray that the command began: a process watches over it."""
    watchers = [words for each in command.children(recursive=True) if traces.__name__ in (words := _words(each))]
    return watchers[0][-1] if watchers else None


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def _find(command: psutil.Process, folder: Path) -> list[psutil.Process]:
    """What the command started, directly or not."""
    try:
        return list({*command.children(recursive=True), *traces.find_processes(folder)})
    except psutil.NoSuchProcess:
        return []
