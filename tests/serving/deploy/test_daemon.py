"""A server's life, with real processes: started, found, killed, cleaned up after."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from serving.deploy import daemon
from serving.deploy.daemon import DaemonError, ServerOptions, ServerState
from tests.support.waiting import PATIENCE_S, wait_until

STAND_IN = Path(__file__).parents[3] / "tests" / "support" / "stand_in_server.py"


def up(storage: Path, profile: str = "ready", port: int = 0, timeout_s: float = PATIENCE_S) -> ServerState:
    command = [sys.executable, str(STAND_IN), profile, str(storage), "127.0.0.1", str(port)]
    options = ServerOptions(profile, str(storage), port=port)
    return daemon.start(options, timeout_s=timeout_s, command=command)[0]


def is_ready(state: ServerState) -> bool:
    return httpx.get(f"{state.address}/readyz", timeout=PATIENCE_S).is_success


def child_of(storage: Path) -> int:
    found = re.search(r"^child (\d+)$", (storage / "server.log").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def assert_nothing_left(storage: Path, state: ServerState | None, child: int) -> None:
    assert not lives(child)
    assert not list(Path("/dev/shm").glob(f"sem.*-{child}-*"))
    assert not (storage / "server.json").exists()
    if state:
        assert state.process() is None
        assert not Path(state.temporary).exists()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{state.address}/readyz")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A background job of a shell ignores SIGINT, and what it starts would, too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def storage(tmp_path: Path):
    yield tmp_path
    daemon.stop(tmp_path, grace_s=0.5)


def test_up_answers_and_down_leaves_nothing(storage: Path) -> None:
    state = up(storage)
    child = child_of(storage)
    assert is_ready(state)
    assert lives(child) and Path(state.temporary).is_dir()
    assert os.getsid(state.pid) == state.pid, "the server would end with the terminal"
    assert daemon.stop(storage) is True
    assert "stopped in order" in (storage / "server.log").read_text()
    assert_nothing_left(storage, state, child)
    assert daemon.stop(storage) is False


def test_up_twice_finds_the_first(storage: Path) -> None:
    first = up(storage)
    again, started = daemon.start(ServerOptions("ready", str(storage)), timeout_s=5, command=["/bin/false"])
    assert again == first and not started


def test_two_storages_are_served_side_by_side(storage: Path, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    first, second = up(storage), up(other)
    try:
        assert first.address != second.address
        assert daemon.stop(storage)
        assert is_ready(second)
        assert lives(child_of(other))
    finally:
        daemon.stop(other)


def test_a_second_server_of_one_storage_is_refused(storage: Path) -> None:
    state = up(storage)
    with pytest.raises(DaemonError, match=r"another server owns .*memorag down --storage"):
        daemon.run_server(ServerOptions("ready", str(storage)))
    assert daemon.state_of(storage) == state
    assert is_ready(state)


@pytest.mark.parametrize("how", ["down", "up"])
def test_a_killed_server_is_cleaned_up(storage: Path, how: str) -> None:
    killed = up(storage)
    child = child_of(storage)
    os.kill(killed.pid, signal.SIGKILL)
    psutil.wait_procs([p for p in [killed.process()] if p], timeout=PATIENCE_S)
    assert killed.process() is None and lives(child) and Path(killed.temporary).exists()
    if how == "down":
        assert daemon.stop(storage)
        assert_nothing_left(storage, killed, child)
    else:
        state = up(storage)
        assert state.pid != killed.pid
        assert not lives(child) and not Path(killed.temporary).exists()


def test_a_server_that_does_not_end_is_killed(storage: Path) -> None:
    state = up(storage, "stubborn")
    child = child_of(storage)
    assert daemon.stop(storage, grace_s=1)
    assert_nothing_left(storage, state, child)


def test_a_crash_while_starting_shows_the_log_and_leaves_nothing(storage: Path) -> None:
    with pytest.raises(DaemonError, match=r"ended before it was ready; the end of .*(?s:.*)the engine would not start"):
        up(storage, "crash")
    assert_nothing_left(storage, None, child_of(storage))


def test_a_server_that_is_never_ready_is_given_up(storage: Path) -> None:
    for timeout_s in (2, 16, 128):  # until it comes as far as to have something to leave
        with pytest.raises(DaemonError, match=f"was not ready, and did nothing for {timeout_s} s"):
            up(storage, "slow", timeout_s=timeout_s)
        if "child " in (storage / "server.log").read_text():
            break
    assert_nothing_left(storage, None, child_of(storage))


def test_a_start_that_gets_on_is_waited_for(storage: Path) -> None:
    """It takes longer than the time limit, as on a slow machine, but something moves all the while."""
    for limit_s in (8, 64):  # the other is for a machine where nothing moves for 8 s while Python starts
        with suppress(DaemonError):
            begun = time.monotonic()
            state = up(storage, f"gradual-{limit_s + 2}", timeout_s=limit_s)
            break
    assert time.monotonic() - begun > limit_s and is_ready(state)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        signal.SIGKILL,
        *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGHUP)),
    ],
)
@pytest.mark.parametrize("command", ["up", "up --foreground", "evaluate"])
def test_a_command_that_ends_while_its_server_starts_leaves_nothing(tmp_path: Path, command: str, number: int) -> None:
    storage = tmp_path / "storage"
    words = [*command.split(), "--storage", str(storage)] if "up" in command else _evaluation(tmp_path)
    with _run_memorag(words, "slow", tmp_path) as process:
        wait_until(lambda: _is_said(storage, process, "child "))
        state = daemon.state_of(storage)
        assert state
        server = state.process()
        process.send_signal(number)
        code = process.wait()
    child = child_of(storage)
    assert code == (-number if number == signal.SIGKILL else {"up --foreground": 1}.get(command, 128 + number))
    if server and (command, number) != ("up --foreground", signal.SIGKILL):
        wait_until(lambda: not server.is_running() and not lives(child))
        wait_until(lambda: not Path(state.temporary).exists() and not (storage / "server.json").exists())
    assert daemon.stop(storage) is ((command, number) == ("up --foreground", signal.SIGKILL))
    assert_nothing_left(storage, None, child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_a_command_borrows_ends_with_it(tmp_path: Path, number: int) -> None:
    storage = tmp_path / "storage"
    with _run_memorag(_evaluation(tmp_path), "ready", tmp_path) as process:
        wait_until(lambda: bool(_runs(process) and (state := daemon.state_of(storage)) and state.address))
        state = daemon.state_of(storage)
        process.send_signal(number)
        process.wait()
    assert state
    wait_until(lambda: not (storage / "server.json").exists() and state.process() is None)
    assert_nothing_left(storage, state, child_of(storage))


def test_a_server_whose_lock_file_was_deleted_takes_it_again(storage: Path) -> None:
    state = up(storage)
    (storage / "server.lock").unlink()
    with pytest.raises(DaemonError, match=rf"server {state.pid} owns .*memorag down --storage"):
        daemon.run_server(ServerOptions("ready", str(storage)))
    (storage / "server.lock").unlink()
    wait_until(lambda: _is_locked(storage / "server.lock"))
    with pytest.raises(DaemonError, match=r"another server owns"):
        daemon.run_server(ServerOptions("ready", str(storage)))
    assert is_ready(state)


def test_a_server_that_lost_its_storage_ends(storage: Path) -> None:
    """Another server has the lock, or the folder is gone."""
    state, child = up(storage), child_of(storage)
    theirs = storage / "theirs"
    with theirs.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        theirs.rename(storage / "server.lock")
        wait_until(lambda: state.process() is None)
    assert "another server owns" in (storage / "server.log").read_text()
    assert not lives(child) and not Path(state.temporary).exists()
    assert (storage / "server.json").exists(), "it may be the other server's"
    other = storage / "folder"
    state, child = up(other), child_of(other)
    shutil.rmtree(other)
    wait_until(lambda: state.process() is None)
    assert not lives(child) and not Path(state.temporary).exists() and not other.exists()


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _evaluation(folder: Path) -> list[str]:
    """`memorag evaluate`, of one question; its server's storage is `folder`/storage."""
    dataset = folder / "questions.jsonl"
    row = {"input": "Who?", "context": "Ann opened the gate.", "answers": ["Ann"], "dataset": "narrativeqa", "_id": "1"}
    dataset.write_text(json.dumps(row | {"length": 4, "language": "en", "all_classes": None}) + "\n")
    return ["evaluate", str(dataset), str(folder)]


@contextmanager
def _run_memorag(words: list[str], behaviour: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The command line `memorag`, whose servers are stand-ins that behave so."""
    script = f"""
import sys
from serving.deploy import daemon
from tests.support import stand_in_server
daemon._command = lambda options: [sys.executable, {str(STAND_IN)!r}, {behaviour!r}, options.storage, options.host, "0"]
daemon._deploy = lambda options, temporary: stand_in_server.Running(
    daemon.replace(options, profile={behaviour!r}, port=0), temporary
)
from serving.cli.main import main
main()
"""
    with (folder / "command.log").open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _runs(process: "subprocess.Popen[str]") -> bool:
    assert process.poll() is None, "the command ended by itself"
    return True


def _is_said(storage: Path, process: "subprocess.Popen[str]", words: str) -> bool:
    if not _runs(process) or not (storage / "server.json").exists():
        return False
    log = storage / "server.log"
    if not log.exists():  # --foreground: what it says goes where the command's own words go
        log = storage.parent / "command.log"
        if words in log.read_text():
            shutil.copy(log, storage / "server.log")
            return True
    return words in log.read_text()


def test_a_port_in_use_is_said_before_anything_starts(storage: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DaemonError, match=f"port {port} .*--port"):
            up(storage, port=port)
    assert not (storage / "server.log").exists()


def test_a_stale_state_never_ends_a_stranger(storage: Path) -> None:
    """The number of a dead server may belong to another process by now: here, to this one."""
    temporary = storage / "temporary"
    temporary.mkdir()
    daemon._write_state(storage, ServerState(os.getpid(), 1.0, "ready", 1.0, str(temporary), "http://127.0.0.1:1"))
    assert daemon.state_of(storage).process() is None
    assert daemon.stop(storage)
    assert not temporary.exists() and not (storage / "server.json").exists()


def test_a_damaged_state_is_an_error_with_advice(storage: Path) -> None:
    (storage / "server.json").write_text('{"pid": 1')
    with pytest.raises(DaemonError, match=r"is damaged .*delete it"):
        daemon.state_of(storage)
    (storage / "server.json").unlink()


def test_reload_takes_up_another_profile_and_its_own_again(storage: Path) -> None:
    before = up(storage)
    after = daemon.reload(storage, "other", timeout_s=PATIENCE_S)
    assert (after.profile, after.generation, after.reload_error) == ("other", 2, None)
    assert (after.pid, after.address) == (before.pid, before.address)
    again = daemon.reload(storage, None, timeout_s=PATIENCE_S)
    assert (again.profile, again.generation) == ("other", 3)
    log = (storage / "server.log").read_text()
    assert log.count("redeployed other") == 2
    assert is_ready(before)
    assert daemon.stop(storage)


def test_a_profile_that_is_refused_changes_nothing(storage: Path) -> None:
    up(storage)
    with pytest.raises(DaemonError, match="goes on as it was: refused-1 is no profile"):
        daemon.reload(storage, "refused-1", timeout_s=PATIENCE_S)
    state = daemon.state_of(storage)
    assert state and (state.profile, state.generation) == ("ready", 2)
    assert "the profile refused-1 is refused" in (storage / "server.log").read_text()
    assert is_ready(state)
    assert daemon.reload(storage, "better", timeout_s=PATIENCE_S).reload_error is None


def test_reload_without_a_server_and_one_that_dies_of_it(storage: Path) -> None:
    with pytest.raises(DaemonError, match=r"no server runs on .*memorag up"):
        daemon.reload(storage, None, timeout_s=5)
    state = up(storage)
    with pytest.raises(DaemonError, match="ended while it was reloading; the end of its log"):
        daemon.reload(storage, "fatal", timeout_s=PATIENCE_S)
    assert state.process() is None


def test_a_reload_that_never_ends_is_not_waited_for(storage: Path) -> None:
    up(storage)
    with pytest.raises(DaemonError, match="not done reloading, and did nothing for 1 s"):
        daemon.reload(storage, "slow", timeout_s=1)
