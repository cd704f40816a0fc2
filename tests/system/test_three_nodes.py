"""Pools on nodes of their own: a server on a Ray cluster of three nodes."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray

from tests.support.server import Server, memorize
from tests.support.three_nodes import NODES, three_nodes, write_profile
from tests.support.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.long

TEXT = "The miller of Vesper Dunmore owed nine sacks of barley to the keeper of the lighthouse. " * 30


@dataclass
class OnNodes:
    """The server, and the Ray cluster that it runs on."""

    server: Server
    address: str
    folder: Path  # of its logs
    version: str  # of the memory "ledger"

    def logs(self, pattern: str) -> list[Path]:
        """Files below Serve's folder of logs."""
        return sorted((self.folder / "session_latest" / "logs" / "serve").glob(pattern))


@pytest.fixture(scope="module")
def on_nodes(tmp_path_factory) -> Iterator[OnNodes]:
    storage = tmp_path_factory.mktemp("nodes")
    with three_nodes(storage) as (address, profile):
        server = Server("", storage)
        started = server.memorag("up", "--profile", str(profile), "--port", "0", check=False)
        log = storage / "server.log"
        assert started.returncode == 0, started.stderr + (log.read_text()[-5000:] if log.exists() else "")
        server.url = json.loads((storage / "server.json").read_text())["address"]
        try:
            made = memorize(server, [{"id": "one", "text": TEXT}], id="ledger")
            yield OnNodes(server, address, Path(os.environ["RAY_TMPDIR"]) / "ray", made["version"])
        finally:
            server.memorag("down")


def actors(address: str) -> list[tuple[str, str]]:
    """Name and node (by the resource that only it has) of every living actor."""
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    try:
        named = {
            node["NodeID"]: next(name for name in NODES if name in node["Resources"])
            for node in ray.nodes()
            if node["Alive"]
        }
        found = ray._private.state.actors().values()
        return [(each["Name"], named[each["Address"]["NodeID"]]) for each in found if each["State"] == "ALIVE"]
    finally:
        ray.shutdown()


def test_an_answer_over_three_nodes(on_nodes: OnNodes) -> None:
    with on_nodes.server.client() as client:
        answer = client.post("/v1/memories/ledger/answer", json={"question": "Who owed nine sacks of barley?"}).json()
    assert answer["degraded"] == ["embedded-model"], "no clues"
    assert all(passage["text"] == TEXT[passage["start"] : passage["end"]] for passage in answer["passages"])
    assert answer["passages"] and answer["evidence"]


def test_replicas_are_on_their_pools_nodes_and_nowhere_else(on_nodes: OnNodes) -> None:
    there = actors(on_nodes.address)
    placed = {name.split("#")[1]: node for name, node in there if name.startswith("SERVE_REPLICA::memorag#")}
    assert placed == {
        deployment: node
        for node, pools in NODES.items()
        for deployments in pools.values()
        for deployment in deployments
    }
    keepers = [node for name, node in there if name.startswith("memory-keeper-")]
    # An engine's process finds its node by address, which on one machine all nodes share.
    assert "memory_pool" in keepers and "generator_pool" not in keepers


def test_what_tenants_do_is_exported_to_prometheus(on_nodes: OnNodes) -> None:
    ray.init(address=on_nodes.address, logging_level="ERROR", log_to_driver=False)
    ports = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]
    ray.shutdown()
    wanted = {
        'ray_memorag_requests_total{.*route="POST /v1/memories/{memory}/answer".*status="200".*tenant="default"',
        'ray_memorag_question_seconds_count{.*task="memorag".*tenant="default"',
        'ray_memorag_stage_seconds_count{.*stage="recall".*tenant="default"',
        'ray_memorag_clues_total{.*tenant="default"',
        'ray_memorag_degraded_answers_total{.*lacking="embedded-model".*tenant="default"',
        'ray_memorag_memorized_tokens_total{.*tenant="default"',
        'ray_memorag_segment_files_total{.*tenant="default".*tier="storage"',
        'ray_memorag_moved_bytes_total{.*tier="storage"',
        "ray_memorag_resident_bytes{",
        "ray_memorag_resident_slots{",
    }

    def missing() -> set[str]:
        scraped = "\n".join(httpx.get(port, timeout=PATIENCE_S).text for port in ports)
        return {pattern for pattern in wanted if not re.search(pattern.replace("/{memory}", "/.memory."), scraped)}

    wait_until(lambda: not missing(), progress=missing)  # Ray's agents collect every few seconds


def test_a_question_is_one_trace_over_all_processes(on_nodes: OnNodes) -> None:
    with on_nodes.server.client() as client:
        client.post("/v1/memories/ledger/answer", json={"question": "Who was owed?"}, headers={"x-request-id": "r-17"})
    wanted = {"memorag.recall", "memorag.retrieve", "memorag.generate", "memorag.evidence"}

    def whole() -> tuple[list[dict], list[str]] | None:
        """All spans, and the traces that have all stages."""
        spans = [span for path in on_nodes.logs("spans/*.json") for span in objects(path.read_text())]
        stages: dict[str, set[str]] = {}
        for span in spans:
            stages.setdefault(span["context"]["trace_id"], set()).add(span["name"])
        traces = [trace for trace, names in stages.items() if wanted <= names]
        return (spans, traces) if traces else None

    spans, traces = wait_until(whole)
    of_one = [span for span in spans if span["context"]["trace_id"] == traces[0]]
    attributes = next(span["attributes"] for span in of_one if span["name"] == "memorag.recall")
    assert attributes["memorag.memory"] == ["ledger"] and attributes["memorag.clues"] >= 0
    assert attributes["memorag.version"] == [on_nodes.version]
    called = " ".join(span["name"] for span in of_one)
    assert all(name in called for name in ("Recaller", "Retriever", "Generator", "Router")), called


def test_logs_are_json_with_the_request_they_are_about(on_nodes: OnNodes) -> None:
    with on_nodes.server.client() as client:
        missing = client.get("/v1/memories/nobody", headers={"x-request-id": "request-4711"})
    assert missing.status_code == 404
    lines = [line for path in on_nodes.logs("replica_memorag_Router_*.log") for line in path.read_text().splitlines()]
    assert lines and all(json.loads(line)["deployment"] == "memorag_Router" for line in lines)
    assert any(json.loads(line).get("request_id") == "request-4711" for line in lines)


def objects(text: str) -> list[dict]:
    """The JSON objects that stand one after another in a file that may still be written to."""
    found, decoder, start = [], json.JSONDecoder(), 0
    while (start := text.find("{", start)) >= 0:
        try:
            value, start = decoder.raw_decode(text, start)
        except ValueError:
            break
        found.append(value)
    return found


def test_a_pool_without_nodes_is_named(on_nodes: OnNodes, tmp_path: Path) -> None:
    profile = write_profile(tmp_path, on_nodes.address, generator={"gold": 1})
    refused = Server("", tmp_path / "other").memorag("up", "--profile", str(profile), "--port", "0", check=False)
    assert refused.returncode != 0
    assert "The pool 'generator' cannot be placed: a replica of Generator needs a node with 1 CPU, 1 gold" in (
        refused.stderr
    )
    assert "The cluster has " in refused.stderr and "change pools.generator" in refused.stderr
    with on_nodes.server.client() as client:
        assert client.get("/readyz").is_success, "the server that runs there is not harmed"
