"""What an operator sees of a running server."""

import json

import pytest

from tests.support.server import Server

DEPLOYMENTS = {"Ingress", "Router", "Memorizer", "Recaller", "Embedder", "Retriever", "Generator"}


def test_pools_replicas_memories_and_rates(server: Server, chronicle: dict) -> None:
    with server.client() as client:
        asked = client.post("/v1/memories/chronicle/answer", json={"question": "Who sailed?", "max_tokens": 4})
    assert asked.is_success
    seen = json.loads(server.memorag("status", "--live", "--json").stdout)
    found = {each["deployment"]: (each["running"], each["status"]) for each in seen["replicas"]}
    assert found == dict.fromkeys(DEPLOYMENTS, (1, "HEALTHY"))
    kept = seen["keepers"].values()  # one a node
    assert sum(each["slots"] for each in kept) >= chronicle["slots"]
    assert all(each["bytes"] <= each["budget_bytes"] for each in kept)
    assert seen["totals"]["memories"] >= 1 and seen["totals"]["tokens"] >= chronicle["tokens"]
    assert seen["totals"]["reads"] >= 1 and seen["reads_per_s"] >= 0


@pytest.mark.long
def test_it_is_a_table_for_people(server: Server, chronicle: dict) -> None:
    lines = server.memorag("status", "--live").stdout
    assert all(name in lines for name in DEPLOYMENTS) and "slots resident" in lines
    assert "memories read for questions a second" in lines
