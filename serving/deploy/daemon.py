"""Starting and ending a server on this machine: what `memorag up`, `down` and `status` do.

A server is one process that owns a storage folder. It keeps `server.json` there (who it is and, when it is ready,
where it answers), writes `server.log`, and holds a lock so that a folder has one server. All its temporary files,
Ray's and vLLM's included, lie in one temporary folder named in `server.json`, which `stop` also finds its
processes by, should the server have been killed. Until it is ready, or for as long as it is `borrowed`, it reads a pipe
from whoever started it, and ends when that closes: so no way in which a command ends leaves a server behind.
"""

import argparse
import contextlib
import fcntl
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import psutil

from cluster.errors import MessageError
from serving.deploy.traces import kill, remove_traces, shared_memory_of

STARTED_BY = "memorag: "  # begins the log lines that `up` shows
_TICK_S = 0.2
_LOCK_EVERY_S = 1.0  # how often a server looks whether its lock file is still its own
_SAID_EVERY_S = 5.0  # how often it says what is still awaited
_STAY = b"stay"  # from a starter that the server outlives
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MOVING = 0.25  # cores that a server's processes use at least while they start
_WAITS_FOR = defaultdict(lambda: "starts", dict.fromkeys(("Recaller", "Generator"), "engine loads"))
_WAITS_FOR |= dict.fromkeys(("Memorizer", "Embedder"), "model loads")
_NEXT_PROFILE = "profile.next"  # in the storage folder: what a reload takes up


class DaemonError(MessageError):
    """A server that could not be started or ended; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server is started with."""

    profile: str
    storage: str
    host: str = "127.0.0.1"
    port: int = 0  # 0 takes a free one


@dataclass(frozen=True, slots=True)
class ServerState:
    """`server.json`: a server process, and where it answers once it is ready."""

    pid: int
    created: float  # start of that process, seconds since the epoch: tells it from a later one of the same number
    profile: str
    started: float  # seconds since the epoch
    temporary: str  # folder of all its temporary files
    address: str | None = None
    ready_s: float | None = None  # seconds from its start until it was ready
    generation: int = 1  # one more for each redeployment
    reload_error: str | None = None  # why the last one was refused
    shared_memory: tuple[str, ...] = ()  # files that its processes had mapped when it became ready

    def process(self) -> psutil.Process | None:
        """The living server process."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.created) < 0.1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if alive else None


class Deployed(Protocol):
    """What deploying gives: see `serving.deploy.app.RunningServer`."""

    @property
    def address(self) -> str: ...
    def redeploy(self, options: "ServerOptions") -> None: ...
    def stop(self) -> None: ...


Deploy = Callable[[ServerOptions, Path], Deployed]


def state_of(storage: Path) -> ServerState | None:
    """What `server.json` says, whether or not that process still lives."""
    try:
        values = json.loads((storage / "server.json").read_text(encoding="utf-8"))
        return ServerState(**{**values, "shared_memory": tuple(values["shared_memory"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DaemonError(
            f"{storage / 'server.json'} is damaged ({error}); end the server by hand, delete it"
        ) from None


def start(
    options: ServerOptions,
    *,
    timeout_s: float,
    on_wait: Callable[[str], None] = lambda _: None,
    command: list[str] | None = None,
) -> tuple[ServerState, bool]:
    """Starts a server in the background; returns it, ready, and whether it was this call that started it.

    `on_wait` is called with each thing that is being waited for. `command` replaces the server's own command line.
    Raises `DaemonError` with the end of its log if it ends before it is ready, or if nothing of it moves for
    `timeout_s`. A call that is interrupted, or whose process is killed, leaves nothing of a server that it began.
    """
    with _starting(options, timeout_s, on_wait, command) as (state, child):
        if child and child.stdin:
            child.stdin.write(_STAY)
            child.stdin.close()
        return state, child is not None


@contextmanager
def borrowed(
    options: ServerOptions,
    *,
    timeout_s: float = 600.0,
    on_wait: Callable[[str], None] = lambda _: None,
    command: list[str] | None = None,
) -> Iterator[ServerState]:
    """A server that ends with the block, or with this process, however that ends. Else as `start`."""
    with _starting(options, timeout_s, on_wait, command) as (state, _):
        try:
            yield state
        finally:
            with _undisturbed():
                stop(Path(options.storage))


@contextmanager
def _starting(
    options: ServerOptions, timeout_s: float, on_wait: Callable[[str], None], command: list[str] | None
) -> Iterator[tuple[ServerState, "subprocess.Popen[bytes] | None"]]:
    """A ready server, and its process if it was begun here; that one ends unless the block has told it to stay."""
    storage = Path(options.storage)
    storage.mkdir(parents=True, exist_ok=True)
    log_path = storage / "server.log"
    state = state_of(storage)
    if state and state.process():
        yield _await_start(storage, None, timeout_s, on_wait), None
        return
    if state:
        stop(storage)  # what a killed server left behind
    require_free_port(options.host, options.port)
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            command or _command(options),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        state = _await_start(storage, child, timeout_s, on_wait)
    except BaseException:
        with _undisturbed():
            _end(child)
            stop(storage)
        raise
    yield state, child


def _await_start(
    storage: Path, child: "subprocess.Popen[bytes] | None", timeout_s: float, on_wait: Callable[[str], None]
) -> ServerState:
    log_path = storage / "server.log"
    progress = _Progress(log_path, timeout_s)
    with log_path.open("r", encoding="utf-8", errors="replace") as log:
        while True:
            state = state_of(storage)
            if state and state.address and state.process():
                return state
            for line in log:
                if line.startswith(STARTED_BY):
                    on_wait(line.removeprefix(STARTED_BY).strip())
            gone = child.poll() is not None if child else not (state and state.process())
            pid = child.pid if child else state.pid if state else os.getpid()
            if gone or not progress.seen(pid):
                why = "ended before it was ready" if gone else f"was not ready, and did nothing for {timeout_s:.0f} s"
                raise DaemonError(f"the server {why}; the end of {log_path}:\n{_tail(log_path)}")
            try:
                (child or psutil.Process(pid)).wait(timeout=_TICK_S)
            except (subprocess.TimeoutExpired, psutil.TimeoutExpired, psutil.NoSuchProcess):
                continue


class _Progress:
    """Whether a server that starts, or reloads, gets on: it logs, a process of it comes or goes, or they compute.

    A slow machine gets on slowly, so there is no limit to how long a start may take. Computing is what they do on
    average in a quarter of the patience: an idle Ray computes a little, too.
    """

    def __init__(self, log: Path, patience_s: float) -> None:
        self._log, self._patience_s = log, patience_s
        self._seen: tuple[int, frozenset[int]] = (0, frozenset())
        self._moved = self._looked = self._measured = time.monotonic()
        self._cpu_s: dict[int, float] = {}

    def seen(self, pid: int) -> bool:
        """False once the server of that process did nothing for `patience_s`."""
        now = time.monotonic()
        if now - self._looked < min(1.0, self._patience_s / 4):
            return True
        self._looked = now
        cpu_s: dict[int, float] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [(server := psutil.Process(pid)), *server.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    cpu_s[process.pid] = times.user + times.system
        seen = self._log.stat().st_size, frozenset(cpu_s)
        if seen != self._seen:
            self._seen, self._moved = seen, now
        passed = now - self._measured
        if passed >= self._patience_s / 4:
            used = sum(seconds - self._cpu_s.get(each, 0.0) for each, seconds in cpu_s.items())
            if used > _MOVING * passed:
                self._moved = now
            self._measured, self._cpu_s = now, cpu_s
        return now - self._moved < self._patience_s


def stop(storage: Path, *, grace_s: float = 40.0) -> bool:
    """Ends the server of `storage` and removes every process and temporary file of it.

    It is asked with SIGTERM; what still lives after `grace_s` is killed. Works as well for a server that was
    killed or crashed. Returns whether there was one.
    """
    state = state_of(storage)
    if state is None:
        return False
    temporary = Path(state.temporary)
    server = state.process()
    shared = {*state.shared_memory}
    if server:
        shared |= shared_memory_of(family := [server, *server.children(recursive=True)])
        server.terminate()
        _, alive = psutil.wait_procs([server], timeout=grace_s)
        kill([*alive, *family] if alive else [p for p in family if p.is_running()])
    remove_traces(temporary, shared)
    (storage / "server.json").unlink(missing_ok=True)
    return True


def reload(storage: Path, profile: str | None, *, timeout_s: float) -> ServerState:
    """Has the running server take up `profile`, or its own again, replica by replica; returns when that is done.

    Raises `DaemonError` where no server runs, it refuses the profile and goes on with the one it has, or nothing of it
    moves for `timeout_s`.
    """
    state = state_of(storage)
    process = state.process() if state else None
    if state is None or process is None or state.address is None:
        raise DaemonError(f"no server runs on {storage}; start one with 'memorag up'")
    (storage / _NEXT_PROFILE).write_text(profile or state.profile, encoding="utf-8")
    process.send_signal(signal.SIGHUP)
    progress = _Progress(storage / "server.log", timeout_s)
    while progress.seen(process.pid):
        after = state_of(storage)
        if after is None or after.process() is None:
            raise DaemonError(
                f"the server ended while it was reloading; the end of its log:\n{_tail(storage / 'server.log')}"
            )
        if after.generation > state.generation:
            if after.reload_error:
                raise DaemonError(f"the server goes on as it was: {after.reload_error}")
            return after
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(timeout=_TICK_S)
    raise DaemonError(
        f"the server was not done reloading, and did nothing for {timeout_s:.0f} s; 'memorag status' says how it is"
    )


def run_server(
    options: ServerOptions,
    *,
    deploy: Deploy | None = None,
    on_ready: Callable[[str], None] = print,
    starter: int | None = None,
) -> None:
    """Is the server: deploys, says in `server.json` that it is ready, and stays until SIGTERM or SIGINT.

    It ends, too, when the file descriptor `starter` closes without having said that it should stay, and when it no
    longer owns the storage.
    Raises `DaemonError` if another server owns the storage, and whatever deploying raises.
    """
    from serving.deploy.local_ray import new_ray_folder

    storage = Path(options.storage)
    storage.mkdir(parents=True, exist_ok=True)
    with _Lock.of(storage) as lock:
        if state_of(storage):
            stop(storage)  # the lock is ours, so that server is gone: remove what it left
        for name in _ENDING:
            signal.signal(name, _leave)
        if starter is not None:
            threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
        temporary = new_ray_folder()
        itself = psutil.Process()
        state = ServerState(itself.pid, itself.create_time(), options.profile, time.time(), str(temporary))
        running: Deployed | None = None
        shared: set[str] = set()
        ended, waits = threading.Event(), _Waits(state.started)
        try:
            _write_state(storage, state)
            _use_temporary(temporary / "tmp")
            threading.Thread(target=lock.watch, args=(ended,), daemon=True).start()
            _say("starting Ray")
            watcher = threading.Thread(target=waits.watch, daemon=True)
            watcher.start()
            running = (deploy or _deploy)(options, temporary)
            waits.end()
            watcher.join()
            _await_ready(running.address)
            calls: queue.SimpleQueue[int] = queue.SimpleQueue()
            for name in _ENDING:
                signal.signal(name, lambda number, _: calls.put(number))
            shared |= shared_memory_of([itself, *itself.children(recursive=True)])
            ready_s = time.time() - state.started
            state = replace(state, address=running.address, ready_s=ready_s, shared_memory=tuple(sorted(shared)))
            lock.require()
            _write_state(storage, state)
            on_ready(running.address)
            while calls.get() == signal.SIGHUP:
                lock.require()
                state = _reload(running, options, state)
                shared |= shared_memory_of([itself, *itself.children(recursive=True)])
                state = replace(state, shared_memory=tuple(sorted(shared)))
                _write_state(storage, state)
        finally:
            for name in _ENDING:
                signal.signal(name, signal.SIG_IGN)
            ended.set()
            waits.end()
            if running:
                running.stop()
            remove_traces(temporary, shared)  # all of it, where deploying failed half-way
            if lock.held() and storage.is_dir():
                (storage / "server.json").unlink(missing_ok=True)


def require_free_port(host: str, port: int) -> None:
    """Raises `DaemonError` if something already listens there; port 0 is always free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DaemonError(
                f"port {port} of {host} cannot be used ({error.strerror}); free it, or choose another with --port, "
                f"0 for any"
            ) from None


def _command(options: ServerOptions) -> list[str]:
    values = {f"--{name}": str(value) for name, value in asdict(options).items()}
    return [
        *(sys.executable, "-m", "serving.deploy.daemon", "--started"),
        *(part for pair in values.items() for part in pair),
    ]


def _deploy(options: ServerOptions, temporary: Path) -> Deployed:
    from serving.config import load_profile
    from serving.deploy.app import deploy

    profile = load_profile(options.profile)
    return deploy(profile, options.storage, options.host, options.port, ray_folder=temporary, say=_say)


def _reload(running: Deployed, options: ServerOptions, state: ServerState) -> ServerState:
    """The state after a redeployment with the profile that was asked for; one that is refused changes nothing."""
    profile = (Path(options.storage) / _NEXT_PROFILE).read_text(encoding="utf-8")
    _say(f"reloading with profile {profile}")
    try:
        running.redeploy(replace(options, profile=profile))
    except Exception as error:  # noqa: BLE001  a boundary: whatever the new profile's fault is, this server goes on
        _say(f"the profile {profile} is refused: {error}")
        return replace(state, generation=state.generation + 1, reload_error=str(error))
    _say("reloaded")
    return replace(state, generation=state.generation + 1, reload_error=None, profile=profile)


def _leave(*_: object) -> None:
    sys.exit(1)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What is asked to end while it cleans up goes on cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.signal(name, signal.SIG_IGN) for name in _ENDING}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _end_with(starter: int) -> None:
    """Ends this process when `starter` closes, unless it said before that this process should stay."""
    if os.read(starter, len(_STAY)) != _STAY:
        _say("whoever started this server is gone: it ends")
        os.kill(os.getpid(), signal.SIGTERM)


class _Lock:
    """A storage folder's one server. It ends with this process, however that ends.

    The file may be deleted under a server, and the folder with it: then it is taken again, or the server ends.
    """

    def __init__(self, storage: Path) -> None:
        self._storage, self._path, self._taking = storage, storage / "server.lock", threading.Lock()
        self._file = self._take()

    @classmethod
    @contextmanager
    def of(cls, storage: Path) -> Iterator["_Lock"]:
        """Raises `DaemonError` if another server owns the storage."""
        lock = cls(storage)
        try:
            state = state_of(storage)
            if state and state.pid != os.getpid() and state.process():  # its lock file was deleted
                raise lock._owned_by(f"server {state.pid}")
            yield lock
        finally:
            lock._file.close()

    def held(self) -> bool:
        """Whether the file at the lock's path is the one that is locked here."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def require(self) -> None:
        """Takes the lock again if its file was deleted. Raises `DaemonError` if that cannot be."""
        with self._taking:
            if self.held():
                return
            if not self._storage.is_dir():
                raise DaemonError(f"{self._storage} was deleted: its server ends")
            before, self._file = self._file, self._take()
            before.close()

    def watch(self, ended: threading.Event) -> None:
        """Ends this process once it does not own the storage any more."""
        while not ended.wait(_LOCK_EVERY_S):
            try:
                self.require()
            except (DaemonError, OSError) as error:
                _say(str(error))
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _take(self) -> IO[str]:
        file = self._path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise self._owned_by("another server") from None
        return file

    def _owned_by(self, owner: str) -> DaemonError:
        return DaemonError(f"{owner} owns {self._storage}; end it with: memorag down --storage {self._storage}")


def _use_temporary(folder: Path) -> None:
    """Makes this process and all it starts keep their temporary files in `folder`."""
    folder.mkdir(parents=True)
    os.environ["TMPDIR"] = str(folder)


def _await_ready(address: str) -> None:
    """Returns when the server answers; whoever started it watches whether it gets on."""
    import httpx

    before = ""
    with httpx.Client(timeout=None, transport=httpx.HTTPTransport(retries=5)) as client:
        while not (response := client.get(f"{address}/readyz")).is_success:
            if (line := f"not ready yet: {response.status_code} {response.text[:200]}") != before:
                _say(line)
                before = line
            threading.Event().wait(_TICK_S)


class _Waits:
    """Logs what a start is waiting for, and how long each thing took; seconds count from `started`."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._ended = threading.Event()

    def end(self) -> None:
        self._ended.set()

    def watch(self) -> None:
        ray_ready, said, ready = False, 0.0, set[str]()
        while not self._ended.wait(1.0):
            if not getattr(sys.modules.get("ray.serve"), "status", None):  # imported, to its end, by the main thread
                continue
            import ray
            from ray import serve

            if not ray.is_initialized():
                continue
            if not ray_ready:
                _say(f"Ray ready {self._seconds()}")
                ray_ready = True
            deployments = [item for app in serve.status().applications.values() for item in app.deployments.items()]
            waiting: dict[str, list[str]] = {}
            for name, status in sorted(deployments):
                if status.status != "HEALTHY":
                    waiting.setdefault(_WAITS_FOR[name], []).append(name)
                elif name not in ready:
                    ready.add(name)
                    _say(f"{name} ready {self._seconds()}")
            if waiting and time.monotonic() - said > _SAID_EVERY_S:
                said = time.monotonic()
                awaited = (f"{', '.join(names)}: {what}" for what, names in waiting.items())
                _say(f"{'; '.join(awaited)} … {self._seconds()}")

    def _seconds(self) -> str:
        return f"{time.time() - self._started:.0f} s"


def _say(line: str) -> None:
    print(f"{STARTED_BY}{line}", flush=True)


def _write_state(storage: Path, state: ServerState) -> None:
    temporary = storage / f"server.json.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    temporary.replace(storage / "server.json")


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _end(child: "subprocess.Popen[bytes]", grace_s: float = 60.0) -> None:
    """Asks a server that is starting to end; what remains of it is `stop`'s."""
    child.terminate()
    try:
        child.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdin:
        child.stdin.close()


def _take_stdin() -> int:
    """Standard input for this process alone: what it starts reads nothing."""
    taken = os.dup(0)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return taken


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving.deploy.daemon")
    for name, kind in {"profile": str, "storage": str, "host": str, "port": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--started", action="store_true", help="end when stdin closes without a word")
    values = vars(parser.parse_args())
    starter = _take_stdin() if values.pop("started") else None
    options = ServerOptions(**values)
    from cluster.pools.placement import PoolUnplaceable
    from memory_worker.models.smollm2 import ModelUnavailable
    from serving.config import ProfileError

    try:
        run_server(options, on_ready=lambda address: print(f"ready at {address}", flush=True), starter=starter)
    except (DaemonError, ModelUnavailable, PoolUnplaceable, ProfileError) as error:  # people's mistakes need no stack
        sys.exit(f"memorag: {error}")


if __name__ == "__main__":
    _main()
