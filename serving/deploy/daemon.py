"""Starting and ending a server on this machine: what `memorag up`, `down` and `status` do.

A server is one process that owns a storage folder. It keeps `server.json` there (who it is and, when it is ready,
where it answers), writes `server.log`, and holds a lock so that a folder has one server. All its temporary files,
Ray's and vLLM's included, lie in one temporary folder named in `server.json`, which `stop` also finds its
processes by, should the server have been killed.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil

from cluster.errors import MessageError
from serving.deploy.traces import kill, remove_traces, shared_memory_of

STARTED_BY = "memorag: "  # begins the log lines that `up` shows
_READY_S = 60.0  # from deployed to answering
_TICK_S = 0.2
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
    Raises `DaemonError` with the end of its log if it ends before it is ready, or takes longer than `timeout_s`.
    """
    storage = Path(options.storage)
    storage.mkdir(parents=True, exist_ok=True)
    log_path = storage / "server.log"
    state = state_of(storage)
    child: subprocess.Popen[bytes] | None = None
    if not (state and state.process()):
        if state:
            stop(storage)  # what a killed server left behind
        require_free_port(options.host, options.port)
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                command or _command(options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    deadline = time.monotonic() + timeout_s
    with log_path.open("r", encoding="utf-8", errors="replace") as log:
        while True:
            state = state_of(storage)
            if state and state.address and state.process():
                return state, child is not None
            for line in log:
                if line.startswith(STARTED_BY):
                    on_wait(line.removeprefix(STARTED_BY).strip())
            gone = child.poll() is not None if child else not (state and state.process())
            if gone or time.monotonic() > deadline:
                why = "ended before it was ready" if gone else f"was not ready after {timeout_s:.0f} s"
                if child:
                    _end(child)
                    stop(storage)
                raise DaemonError(f"the server {why}; the end of {log_path}:\n{_tail(log_path)}")
            try:
                (child or psutil.Process(state.pid if state else os.getpid())).wait(timeout=_TICK_S)
            except (subprocess.TimeoutExpired, psutil.TimeoutExpired, psutil.NoSuchProcess):
                continue


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

    Raises `DaemonError` where no server runs, or it refuses the profile and goes on with the one it has.
    """
    state = state_of(storage)
    process = state.process() if state else None
    if state is None or process is None or state.address is None:
        raise DaemonError(f"no server runs on {storage}; start one with 'memorag up'")
    (storage / _NEXT_PROFILE).write_text(profile or state.profile, encoding="utf-8")
    process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
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
    raise DaemonError(f"the server was not done reloading after {timeout_s:.0f} s; 'memorag status' says how it is")


def run_server(
    options: ServerOptions, *, deploy: Deploy | None = None, on_ready: Callable[[str], None] = print
) -> None:
    """Is the server: deploys, says in `server.json` that it is ready, and stays until SIGTERM or SIGINT.

    Raises `DaemonError` if another server owns the storage, and whatever deploying raises.
    """
    from serving.deploy.local_ray import new_ray_folder

    storage = Path(options.storage)
    storage.mkdir(parents=True, exist_ok=True)
    with _owned(storage):
        if state_of(storage):
            stop(storage)  # the lock is ours, so that server is gone: remove what it left
        ended = threading.Event()
        temporary = new_ray_folder()
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, _leave)
        itself = psutil.Process()
        state = ServerState(itself.pid, itself.create_time(), options.profile, time.time(), str(temporary))
        running: Deployed | None = None
        shared: set[str] = set()
        try:
            _write_state(storage, state)
            _use_temporary(temporary / "tmp")
            _say("starting Ray")
            watcher = threading.Thread(target=_say_what_is_awaited, args=(ended,), daemon=True)
            watcher.start()
            running = (deploy or _deploy)(options, temporary)
            ended.set()
            watcher.join()
            ended.clear()
            _await_ready(running.address)
            calls: queue.SimpleQueue[int] = queue.SimpleQueue()
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # Ray has put its own in their place
                signal.signal(name, lambda number, _: calls.put(number))
            shared |= shared_memory_of([itself, *itself.children(recursive=True)])
            ready_s = time.time() - state.started
            state = replace(state, address=running.address, ready_s=ready_s, shared_memory=tuple(sorted(shared)))
            _write_state(storage, state)
            on_ready(running.address)
            while calls.get() == signal.SIGHUP:
                state = _reload(running, options, state)
                shared |= shared_memory_of([itself, *itself.children(recursive=True)])
                state = replace(state, shared_memory=tuple(sorted(shared)))
                _write_state(storage, state)
        finally:
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(name, signal.SIG_IGN)
            ended.set()
            if running:
                running.stop()
            remove_traces(temporary, shared)  # all of it, where deploying failed half-way
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
    return [sys.executable, "-m", "serving.deploy.daemon", *(part for pair in values.items() for part in pair)]


def _deploy(options: ServerOptions, temporary: Path) -> Deployed:
    from serving.config import load_profile
    from serving.deploy.app import deploy

    profile = load_profile(options.profile)
    return deploy(profile, options.storage, options.host, options.port, ray_folder=temporary)


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
def _owned(storage: Path) -> Iterator[None]:
    """Holds the storage's lock, which ends with this process, however that ends."""
    with (storage / "server.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DaemonError(f"another server owns {storage}; end it with: memorag down --storage {storage}") from None
        yield


def _use_temporary(folder: Path) -> None:
    """Makes this process and all it starts keep their temporary files in `folder`."""
    folder.mkdir(parents=True)
    os.environ["TMPDIR"] = str(folder)


def _await_ready(address: str) -> None:
    import httpx

    deadline = time.monotonic() + _READY_S
    answered = "it does not answer"
    with httpx.Client(timeout=_READY_S, transport=httpx.HTTPTransport(retries=5)) as client:
        while time.monotonic() < deadline:
            response = client.get(f"{address}/readyz")
            if response.is_success:
                return
            answered = f"it answers {response.status_code}: {response.text[:200]}"
            threading.Event().wait(_TICK_S)
    raise DaemonError(f"the server at {address} is deployed but not ready: {answered}")


def _say_what_is_awaited(ended: threading.Event) -> None:
    """Logs, each time it changes, which deployments are not running yet."""
    before = ""
    while not ended.wait(1.0):
        if not getattr(sys.modules.get("ray.serve"), "status", None):  # imported, to its end, by the main thread
            continue
        import ray
        from ray import serve

        if not ray.is_initialized():
            continue
        deployments = [item for app in serve.status().applications.values() for item in app.deployments.items()]
        waiting = sorted(name for name, status in deployments if status.status != "HEALTHY")
        line = f"{len(deployments) - len(waiting)} of {len(deployments)} ready, waiting for {', '.join(waiting)}"
        if waiting and line != before and not ended.is_set():
            _say(line)
            before = line


def _say(line: str) -> None:
    print(f"{STARTED_BY}{line}", flush=True)


def _write_state(storage: Path, state: ServerState) -> None:
    temporary = storage / f"server.json.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    temporary.replace(storage / "server.json")


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(timeout=40)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving.deploy.daemon")
    for name, kind in {"profile": str, "storage": str, "host": str, "port": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    options = ServerOptions(**vars(parser.parse_args()))
    from cluster.pools.placement import PoolUnplaceable
    from serving.config import ProfileError

    try:
        run_server(options, on_ready=lambda address: print(f"ready at {address}", flush=True))
    except (DaemonError, PoolUnplaceable, ProfileError) as error:  # people's mistakes need no stack
        sys.exit(f"memorag: {error}")


if __name__ == "__main__":
    _main()
