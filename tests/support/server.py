"""A real server, started and ended with the commands a user types, and what tests ask of it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from examples.chronicles import document
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
EXAMPLE = document(7, 150, "test")  # examples/chronicle.txt, which `make up` memorizes, with its questions
FIRST_QUESTION, FIRST_ANSWER = "What haven did the finder of the green sword reach?", "Kirsund"
SHARED = ROOT.parent / "shared"
MEMORAG = Path(sys.executable).with_name("memorag")
CLUSTER_PID = "cluster.pid"  # beside server.json, where the server did not start its cluster itself


@dataclass
class Server:
    """A running server and where it keeps its things."""

    url: str
    storage: Path

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def manifest(self, memory: str, version: str, tenant: str = "default") -> dict:
        """The manifest of a version, as it lies on the disk."""
        path = self.storage / "memories" / tenant / memory / version / "manifest.json"
        return json.loads(path.read_text(encoding="utf-8"))["manifest"]

    def processes(self) -> list[psutil.Process]:
        """What the server has started, and the nodes of its cluster where `three_nodes` has started those."""
        started_by = [json.loads((self.storage / "server.json").read_text())["pid"]]
        if (cluster := self.storage / CLUSTER_PID).is_file():
            started_by.append(int(cluster.read_text()))
        return [process for pid in started_by for process in psutil.Process(pid).children(recursive=True)]

    def log_names(self, words: str) -> bool:
        """Whether any log of the server's processes says these words."""
        temporary = Path(json.loads((self.storage / "server.json").read_text())["temporary"])
        logs = [path for path in (temporary / "session_latest" / "logs").rglob("*") if path.is_file()]
        return any(words.encode() in path.read_bytes() for path in [self.storage / "server.log", *logs])

    def memorag(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs the command line against this server."""
        environment = os.environ | {"MEMORAG_STORAGE": str(self.storage), "NO_COLOR": "1"}
        environment.pop("MEMORAG_URL", None)
        return subprocess.run(
            [MEMORAG, *arguments], capture_output=True, text=True, env=environment, check=check, cwd=ROOT
        )


def memorize(server: Server, documents: list[dict], **fields) -> dict:
    """Creates a memory over HTTP and follows its events until it is ready."""
    with server.client() as client:
        created = client.post("/v1/memories", json={"documents": documents, **fields})
        assert created.status_code == 202, created.text
        events = follow(client, created.json()["id"])
    assert events[-1][0] == "ready", events[-2:]
    return events[-1][1]


def follow(client: httpx.Client, memory: str) -> list[tuple[str, dict]]:
    """The events of a memory, name and data, until its job has ended."""
    with client.stream("GET", f"/v1/memories/{memory}/events") as response:
        return read_events(response)


def read_events(response: httpx.Response) -> list[tuple[str, dict]]:
    """Server-sent events as (name, data)."""
    events, name = [], ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            events.append((name, json.loads(line.removeprefix("data: "))))
    return events


def check_problem(response: httpx.Response, status: int, words: str = "") -> None:
    """It is an RFC 9457 problem of that status, whose detail has these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    problem = response.json()
    assert problem["status"] == status and problem["title"] and problem["type"]
    assert words in problem["detail"], problem["detail"]


def make(target: str, storage: Path) -> subprocess.CompletedProcess:
    """Runs a target of the Makefile as a user would, on a free port and this storage."""
    # Whoever runs the tests has installed what is there: a test never installs, least of all below other tests.
    command = ["make", "-o", "install", target, f"STORAGE={storage}", "PORT=0", f"PYTHON={sys.executable}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def up(storage: Path, profile: Path) -> str:
    """Starts the server as a user does, on a free port; its address."""
    started = Server("", storage).memorag("up", "--profile", str(profile), "--port", "0", check=False)
    log = storage / "server.log"
    assert started.returncode == 0, started.stderr + (log.read_text()[-5000:] if log.exists() else "")
    return json.loads((storage / "server.json").read_text())["address"]


def segment_files(segments: list[dict]) -> dict[str, str]:
    """Paths and digests, in order."""
    return {file["path"]: file["digest"] for segment in segments for file in segment["files"]}
