"""One real server for the whole session, started and ended with the commands a user types."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
MEMORAG = Path(sys.executable).with_name("memorag")


@dataclass
class Server:
    """A running server and where it keeps its things."""

    url: str
    storage: Path

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def memorag(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs the command line against this server."""
        environment = os.environ | {"MEMORAG_STORAGE": str(self.storage), "NO_COLOR": "1"}
        environment.pop("MEMORAG_URL", None)
        return subprocess.run(
            [MEMORAG, *arguments], capture_output=True, text=True, env=environment, check=check, cwd=ROOT, timeout=300
        )


def memorize(server: Server, documents: list[dict], **fields) -> dict:
    """Creates a memory over HTTP and follows its events until it is ready."""
    with server.client() as client:
        created = client.post("/v1/memories", json={"documents": documents, **fields})
        assert created.status_code == 202, created.text
        with client.stream("GET", f"/v1/memories/{created.json()['id']}/events") as events:
            lines = [line for line in events.iter_lines() if line]
    assert lines[-2] == "event: ready", lines[-4:]
    return json.loads(lines[-1].removeprefix("data: "))


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """`make up` before the first test, `make down` after the last, and nothing left behind.

    For work on the tests themselves, MEMORAG_TEST_STORAGE names the storage of a server that runs already.
    """
    if running := os.environ.get("MEMORAG_TEST_STORAGE"):
        yield Server(json.loads((Path(running) / "server.json").read_text())["address"], Path(running))
        return
    storage = tmp_path_factory.mktemp("storage")
    started = make("up", storage)
    log = storage / "server.log"
    assert started.returncode == 0, started.stderr + (log.read_text()[-5000:] if log.exists() else "")
    assert all(word in started.stdout for word in ("Vesper Dunmore", "untrained", "http://127.0.0.1:")), started.stdout
    state = json.loads((storage / "server.json").read_text())
    family = [psutil.Process(state["pid"]), *psutil.Process(state["pid"]).children(recursive=True)]
    yield Server(state["address"], storage)
    ended = make("down", storage)
    assert ended.returncode == 0, ended.stderr
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"left behind: {[process.cmdline() for process in alive if process.is_running()]}"
    assert not (storage / "server.json").exists() and not Path(state["temporary"]).exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(state["address"] + "/healthz")


def make(target: str, storage: Path) -> subprocess.CompletedProcess:
    """Runs a target of the Makefile as a user would, on a free port and this storage."""
    command = ["make", target, f"STORAGE={storage}", "PORT=0", f"PYTHON={sys.executable}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)


@pytest.fixture(scope="session")
def chronicle(server) -> dict:
    """The bundled example, which `make up` memorized."""
    with server.client() as client:
        made = client.get("/v1/memories/chronicle").json()
    assert made["status"] == "ready", made
    return made
