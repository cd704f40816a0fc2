"""Processes of a running server: found by what they say they are, and killed, one or all, with SIGKILL."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.waiting import PATIENCE_S, wait_until

PARTS = (
    "Memorizer", "Recaller", "Embedder", "Retriever", "Generator", "Router", "Ingress", "Catalog", "MemoryKeeper",
    "Recaller's engine", "Generator's engine",
)  # fmt: skip


def kill_part(state: dict[str, Any], part: str) -> float:
    """Kills a process of a part of the server of this `server.json`, once there is one; when that was (monotonic)."""

    def found() -> list[psutil.Process]:
        return [each for each in psutil.Process(state["pid"]).children(recursive=True) if _is(each, part)]

    wait_until(found)[0].send_signal(signal.SIGKILL)
    return time.monotonic()


def kill_server(state: dict[str, Any]) -> None:
    """Kills the server of this `server.json`, with everything it started."""
    server = psutil.Process(state["pid"])
    family = [server, *server.children(recursive=True)]
    for process in family:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive, f"not dead: {alive}"


def start_again(state: dict[str, Any], storage: Path) -> None:
    """The command that a person would type after the server of this `server.json` was killed; on the same port."""
    port = state["address"].rpartition(":")[2]
    command = [Path(sys.executable).with_name("memorag"), "up", "--profile", state["profile"]]
    started = subprocess.run([*command, "--port", port, "--storage", storage], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or is a zombie
        return ""


def _is(process: psutil.Process, part: str) -> bool:
    try:
        title = " ".join(process.cmdline())
        if part.endswith("'s engine"):
            parent, name = process.parent(), part.removesuffix("'s engine")
            return "EngineCore" in title and parent is not None and f":{name}" in " ".join(parent.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return title.startswith((f"ray::ServeReplica:memorag:{part}", f"ray::{part}"))
