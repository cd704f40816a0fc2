"""One real server for the whole session."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.server import FIRST_ANSWER, Server, make
from tests.support.waiting import PATIENCE_S


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
    expected = (f"Answer\n {FIRST_ANSWER} [", "chronicles only", "http://127.0.0.1:")
    assert all(words in started.stdout for words in expected), started.stdout
    state = json.loads((storage / "server.json").read_text())
    family = [psutil.Process(state["pid"]), *psutil.Process(state["pid"]).children(recursive=True)]
    yield Server(state["address"], storage)
    ended = make("down", storage)
    assert ended.returncode == 0, ended.stderr
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive, f"left behind: {[process.cmdline() for process in alive if process.is_running()]}"
    assert not (storage / "server.json").exists() and not Path(state["temporary"]).exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(state["address"] + "/healthz")


@pytest.fixture(scope="session")
def chronicle(server) -> dict:
    """The bundled example, which `make up` memorized."""
    with server.client() as client:
        made = client.get("/v1/memories/chronicle").json()
    assert made["status"] == "ready", made
    return made
