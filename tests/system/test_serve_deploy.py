"""The shipped Serve file is deployed on a Ray cluster that was started by hand, and answers a question."""

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from serving.deploy.local_ray import new_ray_folder
from serving.deploy.traces import remove_traces
from tests.support.server import ROOT, Server, memorize
from tests.support.waiting import PATIENCE_S, wait_until

BIN = Path(sys.executable).parent
TEXT = "Ida Quill kept the ferry at Low Marsh. In spring she sold it to the brothers Penhallow, for forty crowns."


class Cluster:
    """A Ray cluster of one node, with a token and a dashboard, and what is deployed on it."""

    def __init__(self, folder: Path, storage: Path) -> None:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MEMORAG_"))}
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # Serve has ended by then
            "RAY_worker_niceness": "0",  # as under `memorag up`: the tests share the machine
            "TMPDIR": str(folder / "tmp"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        (folder / "tmp").mkdir()
        self.folder, self.storage = folder, storage
        self.http, self.dashboard, self.metrics, agent, client = free_ports(5)
        self.command = [
            *(BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--port=0", "--num-cpus=16"),
            *("--node-ip-address=127.0.0.2", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            *(f"--metrics-export-port={self.metrics}", f"--temp-dir={folder}", "--object-store-memory=536870912"),
        ]

    def start(self) -> subprocess.Popen:
        """Starts Ray; returns its process when its dashboard answers. On a busy machine Ray may need several tries."""
        log = self.folder / "start.log"
        for tries in (2, 1, 0):
            with log.open("wb") as output:
                process = subprocess.Popen(
                    self.command,
                    env=self.environment,
                    cwd=self.storage,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            while process.poll() is None:
                if "Ray runtime started" in log.read_text() and self.dashboard_answers():
                    return process
                threading.Event().wait(0.5)
            assert tries and "timed out during startup" in log.read_text(), log.read_text()
        raise AssertionError

    def dashboard_answers(self) -> bool:
        """Whether the dashboard says that it is well, which it tells without a token."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.dashboard}/api/gcs_healthz", timeout=PATIENCE_S).is_success
        except httpx.TransportError:
            return False

    def serve(self, *arguments: str, tries: int = 1) -> str:
        """Runs Serve's command line against this cluster, up to so many times; returns what it said."""
        address = f"http://127.0.0.1:{self.dashboard}"
        ran = subprocess.run(
            [BIN / "serve", *arguments, "--address", address],
            env=self.environment,
            cwd=self.storage,
            capture_output=True,
            text=True,
        )
        if ran.returncode and tries > 1:
            return self.serve(*arguments, tries=tries - 1)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def status(self) -> dict[str, str]:
        """The status of each application, and why it is so."""
        headers = {"Authorization": f"Bearer {(self.folder / 'token').read_text()}"}
        asked = httpx.get(
            f"http://127.0.0.1:{self.dashboard}/api/serve/applications/", headers=headers, timeout=PATIENCE_S
        )
        applications = asked.raise_for_status().json()["applications"].values()
        return {app["name"]: f"{app['status']}: {app['message']}" for app in applications}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = new_ray_folder()
    try:
        running = Cluster(folder, tmp_path_factory.mktemp("storage"))
        process = running.start()
        yield running
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not alive, f"left behind: {[left.cmdline() for left in alive if left.is_running()]}"
    finally:
        remove_traces(folder, set())


@pytest.mark.long
def test_the_shipped_file_answers_a_question(cluster):
    config = yaml.safe_load((ROOT / "cluster" / "deploy" / "serve.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = cluster.http
    config["applications"][0]["args"]["storage"] = str(cluster.storage)
    (cluster.storage / "serve.yaml").write_text(yaml.safe_dump(config))
    refused = httpx.put(
        f"http://127.0.0.1:{cluster.dashboard}/api/serve/applications/", json=config, timeout=PATIENCE_S
    )
    assert refused.status_code == 401, "whoever reaches the dashboard could deploy"
    cluster.serve("deploy", "serve.yaml", tries=3)  # Serve gives its proxy 60 s to start, busy machine or not

    server = Server(f"http://127.0.0.1:{cluster.http}", cluster.storage)
    starting = await_ready(cluster, server)
    assert starting <= {503}, "the proxy did not have its middleware: a server that starts must not say 404"
    memorize(server, [{"id": "ferry", "text": TEXT}], id="marsh")
    with server.client() as client:
        answered = client.post("/v1/memories/marsh/answer", json={"question": "Who kept the ferry at Low Marsh?"})
    assert answered.status_code == 200, answered.text
    answer = answered.json()
    assert any("Ida Quill" in passage["text"] for passage in answer["passages"])
    assert "embedded-model" in answer["degraded"] and "recall" not in answer["degraded"]
    assert (cluster.storage / "memories" / "default" / "marsh").is_dir()
    await_metrics(
        cluster,
        {
            "ray_memorag_requests_total": ['route="POST /v1/memories/{memory}/answer"', 'status="200"'],
            "ray_memorag_question_seconds_bucket": ['task="memorag"', 'tenant="default"'],
            "ray_memorag_memorized_tokens_total": ['tenant="default"'],
            "ray_serve_deployment_replica_healthy": ['application="memorag"', 'deployment="Generator"'],
            "ray_serve_replica_startup_latency_ms_count": ['application="memorag"', 'deployment="Recaller"'],
            "ray_actors": ['Name="Catalog"', 'State="ALIVE"'],
            "ray_object_store_memory": ['Location="SPILLED"'],
            "ray_node_disk_free": [],
        },
    )
    cluster.serve("shutdown", "--yes")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/healthz", timeout=PATIENCE_S)


def await_ready(cluster: Cluster, server: Server) -> set[int]:
    """Waits until the server is ready; the statuses that it gave before that."""
    before: set[int] = set()
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, transport=httpx.HTTPTransport(retries=6)) as client:

        def ready() -> bool:
            try:
                response = client.get("/readyz")
            except httpx.TransportError:
                return False  # no proxy listens yet
            if not response.is_success:
                before.add(response.status_code)
                assert response.headers["content-type"].startswith("application/problem+json"), response.text
                status = cluster.status()
                assert "DEPLOY_FAILED" not in str(status), status
            return response.is_success

        wait_until(ready, progress=cluster.status)
    return before


def await_metrics(cluster: Cluster, wanted: dict[str, list[str]]) -> None:
    """Waits until a series of each name, with these labels, is scraped from the node."""

    def missing() -> set[str]:
        url = f"http://127.0.0.2:{cluster.metrics}/metrics"
        lines = httpx.get(url, timeout=PATIENCE_S).text.splitlines()
        return {
            name
            for name, labels in wanted.items()
            if not any(line.startswith(f"{name}{{") and all(label in line for label in labels) for line in lines)
        }

    wait_until(lambda: not missing(), progress=missing)  # Ray's processes report every ten seconds


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing uses, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
