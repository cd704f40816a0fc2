"""What a server leaves on a machine, however it ended, and removing it: called by `serving.deploy.daemon`.

Run as a program, it waits for the end of the process that started it, and then removes what that one left.
"""

import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")


def remove_traces(temporary: Path, shared: set[str]) -> None:
    """Kills the processes that name `temporary`, deletes it, and those of the `shared` files that nothing maps."""
    # A process may start another while it is being killed: look until none is found.
    while rest := find_processes(temporary):
        shared |= shared_memory_of(rest)
        kill(rest)
    shutil.rmtree(temporary, ignore_errors=True)
    still_mapped = set().union(*map(_list_mapped, psutil.process_iter())) if shared else set()
    for path in shared - still_mapped:
        Path(path).unlink(missing_ok=True)


def watch_over(folder: Path) -> None:
    """From now on, all that names `folder` ends with this process, however that ends: by SIGKILL, too.

    That is done by a process of its own, which `remove_traces` ends as well.
    """
    read, _write = os.pipe()  # the latter is never closed, but by the end of this process
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", __name__, str(folder)],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, read, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
        setsid=True,
    )
    os.close(read)


def shared_memory_of(processes: Iterable[psutil.Process]) -> set[str]:
    """Files below /dev/shm that the processes have mapped, or that carry their number, as joblib's semaphores do."""
    found: set[str] = set()
    for process in processes:
        found |= {str(path) for path in _SHARED_MEMORY.glob(f"sem.*-{process.pid}-*")} | _list_mapped(process)
    return {path for path in found if Path(path).exists()}


def kill(processes: list[psutil.Process]) -> None:
    """Kills them and waits until they are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


def find_processes(folder: Path) -> list[psutil.Process]:
    """Processes, this one apart, that name `folder` in their command line or environment, or have files open in it.

    All three, because Ray's workers overwrite their command line, and with it their environment, with a title.
    """
    mark = f"{folder}/"
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and any(mark in f"{t}/" for t in _traces(p))]


def _traces(process: psutil.Process) -> Iterator[str]:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return
        yield from process.cmdline()
        yield from process.environ().values()
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            yield str(descriptor.readlink())
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return


def _list_mapped(process: psutil.Process) -> set[str]:
    try:
        return {m.path for m in process.memory_maps() if m.path.startswith(f"{_SHARED_MEMORY}/")}
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return set()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    remove_traces(Path(sys.argv[1]), set())
