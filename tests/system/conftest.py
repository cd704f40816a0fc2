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
    storage = tmp_path_factory.mktemp("storage")
    command = [MEMORAG, "up", "--profile", "embedded", "--port", "0", "--storage", storage, "--json"]
    started = subprocess.run(command, capture_output=True, text=True, timeout=400)
    log = storage / "server.log"
    assert started.returncode == 0, started.stderr + (log.read_text()[-5000:] if log.exists() else "")
    state = json.loads((storage / "server.json").read_text())
    family = [psutil.Process(state["pid"]), *psutil.Process(state["pid"]).children(recursive=True)]
    yield Server(state["address"], storage)
    subprocess.run([MEMORAG, "down", "--storage", storage], check=True, timeout=120)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"left behind: {[process.cmdline() for process in alive if process.is_running()]}"
    assert not (storage / "server.json").exists()


@pytest.fixture(scope="session")
def chronicle(server) -> dict:
    """The bundled example, memorized."""
    text = (ROOT / "examples" / "chronicle.txt").read_text()
    return memorize(server, [{"id": "chronicle.txt", "text": text}], id="chronicle", title="The Chronicle")
