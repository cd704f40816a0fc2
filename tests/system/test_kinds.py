"""A memory of each kind, over HTTP: made, asked, changed and mended alike; and a server of a model without beacons."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from examples.chronicles import document
from tests.support.damage import flip, forget
from tests.support.documents import check_exact, put, text
from tests.support.kinds_of_memory import RATIOS, stock_model
from tests.support.server import ROOT, Server, check_problem, follow, memorize, up

TAG = "kinds"
CHRONICLE = document(7, 60)  # what the embedded model reads whole, and recalls clues of
WORDS = {name: text(name, "only", 60) for name in RATIOS} | {"full": CHRONICLE["text"]}  # longer than a gist may be
QUESTIONS = {name: f"Who lit the lamp of {name}?" for name in RATIOS} | {"full": CHRONICLE["questions"][0]["question"]}


@pytest.fixture(scope="module")
def memories(server: Server) -> Iterator[dict[str, dict]]:
    """One document in each kind, by kind."""
    ids = {kind: f"{kind}-{uuid.uuid4().hex[:8]}" for kind in RATIOS}
    yield {
        kind: memorize(server, [{"id": "d", "text": WORDS[kind]}], id=id, kind=kind, ratio=RATIOS[kind], tags=[TAG])
        for kind, id in ids.items()
    }
    with server.client() as client:
        for id in ids.values():
            client.delete(f"/v1/memories/{id}")


@pytest.mark.parametrize("kind", RATIOS)
def test_a_memory_of_each_kind_is_asked(server: Server, memories: dict[str, dict], kind: str):
    memory = memories[kind]
    assert (memory["kind"], memory["ratio"]) == (kind, RATIOS[kind])
    head = len(server.manifest(memory["id"], memory["version"])["head_tokens"])
    least = 1 if kind == "gist" else -(-memory["tokens"] // RATIOS[kind])
    most = 4096 // 32 if kind == "gist" else least
    assert (0 < memory["dropped"] < 1) if kind == "pruned" else memory["dropped"] is None
    assert head + least <= memory["slots"] <= head + most and memory["tokens"] > 4096 // 32
    with server.client() as client:
        for task in ("memorag", "memory", "summarize"):
            body = {"question": QUESTIONS[kind], "task": task, "max_tokens": 8}
            answer = client.post(f"/v1/memories/{memory['id']}/answer", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["degraded"] == ["embedded-model"] and answer.json()["answer"]
            check_exact(answer.json()["passages"], {memory["id"]: {"d": WORDS[kind]}})
            assert task != "memorag" or answer.json()["clues"]


def test_memories_of_all_kinds_are_asked_at_once(server: Server, memories: dict[str, dict]):
    with server.client() as client:
        answer = client.post("/v1/answer", json={"question": "Who lit the lamps?", "tag": TAG, "max_tokens": 8})
        assert answer.status_code == 200 and answer.json()["degraded"] == ["embedded-model"], answer.text
        assert len(answer.json()["memories"]) == len(memories) and answer.json()["clues"]
        together = {"question": "Who lit the lamps?", "tag": TAG, "task": "memory"}
        check_problem(client.post("/v1/answer", json=together), 422, "full and gist and pruned cannot be read together")


# The Memorizer makes what is added, or damaged, of every kind in `memory_worker/memorize/test_kinds.py`.
one_kind = pytest.mark.parametrize(
    "kind", [kind if kind == "gist" else pytest.param(kind, marks=pytest.mark.long) for kind in RATIOS]
)


@one_kind
def test_a_document_that_is_put_has_the_kind_of_its_memory(server: Server, memories: dict[str, dict], kind: str):
    id = memories[kind]["id"]
    with server.client() as client:
        assert put(client, id, "second", text("second", kind, 40)).status_code == 202
        *_, (name, changed) = follow(client, id)
        assert name == "ready" and (changed["kind"], changed["ratio"]) == (kind, RATIOS[kind])
        added = changed["slots"] - memories[kind]["slots"]
        assert added > 0 and (kind != "full" or added == changed["documents"][1]["tokens"])
        manifest = server.manifest(id, changed["version"])
        assert manifest["kind"] == kind and manifest["parent"] == memories[kind]["version"]


@one_kind
def test_a_damaged_segment_is_made_again_the_same(server: Server, kind: str):
    forget(server)
    id = f"hurt-{kind}-{uuid.uuid4().hex[:8]}"
    memory = memorize(server, [{"id": "d", "text": WORDS[kind]}], id=id, kind=kind, ratio=RATIOS[kind])
    question = {"question": QUESTIONS[kind], "max_tokens": 4}

    def files(version: str) -> list[dict]:
        (document,) = server.manifest(id, version)["documents"]
        return [file for segment in document["segments"] for file in segment["files"]]

    with server.client() as client:
        flip(server, files(memory["version"])[0]["path"])
        forget(server)
        asked = client.post(f"/v1/memories/{id}/answer", json=question)
        assert asked.status_code == 200 and "recall" in asked.json()["degraded"]
        *_, (name, mended) = follow(client, id)
        assert name == "ready" and mended["version"] != memory["version"] and mended["kind"] == kind
        assert [f["digest"] for f in files(mended["version"])] == [f["digest"] for f in files(memory["version"])]
        assert client.post(f"/v1/memories/{id}/answer", json=question).json()["degraded"] == ["embedded-model"]
        client.delete(f"/v1/memories/{id}")


def test_what_a_kind_cannot_be_is_refused(server: Server):
    documents = [{"text": "The gate is open."}]
    with server.client() as client:
        for body, words in [
            ({"kind": "full", "ratio": 4}, "ratio 4 does not fit a full memory"),
            ({"kind": "gist", "ratio": 1}, "use one of 2, 4, 8, 16, 32"),
            ({"kind": "pruned", "ratio": 32}, "use one of 2, 3, 4, 8, 16"),
            ({"kind": "whole"}, "kind"),
        ]:
            check_problem(client.post("/v1/memories", json={"documents": documents, **body}), 422, words)


def test_the_command_line_and_an_archive_keep_the_kind(server: Server, tmp_path: Path):
    file, archive = tmp_path / "gate.txt", tmp_path / "gate.tar"
    file.write_text("The gate is open. " * 40)
    made = json.loads(server.memorag("memorize", str(file), "--id", "gate", "--kind", "full", "--json").stdout)
    assert (made["kind"], made["ratio"]) == ("full", 1)
    server.memorag("export", "gate", str(archive))
    server.memorag("import", str(archive), "--id", "gate-again")
    with server.client() as client:
        again = client.get("/v1/memories/gate-again").json()
        assert (again["kind"], again["slots"], again["status"]) == ("full", made["slots"], "ready")
        for id in ("gate", "gate-again"):
            client.delete(f"/v1/memories/{id}")


@pytest.fixture(scope="module")
def stock(random_model, tmp_path_factory) -> Iterator[Server]:
    """A server whose memory model is a stock Qwen2 checkpoint: no beacon weights, and no setting that says so."""
    storage = tmp_path_factory.mktemp("stock")
    settings = yaml.safe_load((ROOT / "serving" / "profiles" / "embedded.yaml").read_text())
    settings["memory"]["engine"]["model"] = str(stock_model(random_model, storage))
    settings["memory"]["memorize"]["ratio"] = 16
    profile = storage / "profile.yaml"
    profile.write_text(yaml.safe_dump(settings))
    running = Server("", storage)
    try:
        running.url = up(storage, profile)
        yield running
    finally:
        running.memorag("down")


@pytest.mark.long  # a server of its own
def test_a_model_without_beacon_weights_prunes(stock: Server):
    memory = memorize(stock, [{"id": "d", "text": WORDS["pruned"]}], id="stock")
    assert (memory["kind"], memory["ratio"]) == ("pruned", 16)
    full = memorize(stock, [{"id": "d", "text": WORDS["full"]}], id="whole", kind="full")
    assert full["kind"] == "full" and full["slots"] > full["tokens"]
    question = {"question": "Who lit the lamp?", "max_tokens": 8}
    with stock.client() as client:
        for id in ("stock", "whole"):
            answer = client.post(f"/v1/memories/{id}/answer", json=question)
            assert answer.status_code == 200 and answer.json()["degraded"] == ["embedded-model"], answer.text
            assert answer.json()["clues"] and answer.json()["passages"]
        refused = client.post("/v1/memories", json={"kind": "beacon", "documents": [{"text": "The gate."}]})
        check_problem(refused, 422, "which has no beacon weights: use one of full, gist, pruned")
