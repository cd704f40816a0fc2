"""The whole server is killed, and its storage goes away for a while: nothing is lost, no answer is wrong.

The tests follow one another on a server of their own: it is killed while it memorizes a long text, and started again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.chaos import text
from tests.support.processes import kill_server
from tests.support.server import ROOT, Server, follow, memorize, segment_files, up
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long  # a server of its own, started twice

TASKS = ("memorag", "rag", "memory")
QUESTION = "What stood by the lantern of the harbour?"


SHORT = {"asked": text("asked", 200), "unasked": text("unasked", 200)}
LONG = text("long", 3000)  # some 96,000 tokens
PROMPT = 4096


@dataclass
class Recovered:
    """The server after it was killed and started again, and what was there before."""

    server: Server
    versions: dict[str, str]  # of the memories that were ready
    checkpoint: dict  # of the long text's job, as it lay there when the server was dead
    folder: Path  # of the version that job makes
    written: dict[str, tuple[int, int]]  # the files it names: inode and time of the last change


@pytest.fixture(scope="module")
def recovered(tmp_path_factory) -> Iterator[Recovered]:
    storage = tmp_path_factory.mktemp("recovery")
    profile = storage / "profile.yaml"
    settings = yaml.safe_load((ROOT / "serving" / "profiles" / "embedded.yaml").read_text())
    settings["memory"]["memorize"]["checkpoint_windows"] = 16
    settings["memory"]["engine"]["max_model_len"] = PROMPT  # so that the long text is more than one prompt holds
    profile.write_text(yaml.safe_dump(settings))
    server = Server(up(storage, profile), storage)
    try:
        made = [memorize(server, [{"id": name, "text": words}], id=name) for name, words in SHORT.items()]
        with server.client() as client:
            begun = client.post("/v1/memories", json={"id": "long", "documents": [{"id": "long", "text": LONG}]})
        assert begun.status_code == 202, begun.text
        folder = storage / "memories" / "default" / "long" / begun.json()["version"]
        wait_until(lambda: files_in(folder / "checkpoint.json") >= 3, lambda: files_in(folder / "checkpoint.json"))
        kill_server(json.loads((storage / "server.json").read_text()))
        assert not (folder / "manifest.json").exists(), "it was killed too late"
        checkpoint = json.loads((folder / "checkpoint.json").read_text())
        written = {path: told_apart(storage / "memories" / path) for path in segment_files(checkpoint["segments"])}
        server.url = up(storage, profile)
        yield Recovered(server, {memory["id"]: memory["version"] for memory in made}, checkpoint, folder, written)
    finally:
        server.memorag("down")


def files_in(checkpoint: Path) -> int:
    """How many files a job's checkpoint names."""
    return len(segment_files(json.loads(checkpoint.read_text())["segments"])) if checkpoint.exists() else 0


def told_apart(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def ask(client: httpx.Client, memory: str, task: str = "memorag") -> httpx.Response:
    return client.post(f"/v1/memories/{memory}/answer", json={"question": QUESTION, "task": task, "max_tokens": 8})


def check_whole(response: httpx.Response, memory: str, words: str) -> None:
    """It is answered from that memory, with nothing left out, and what is quoted stands there."""
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["degraded"] == ["embedded-model"] and answer["memory"] == memory
    assert bool(answer["passages"]) == (answer["task"] != "memory")
    check_exact(answer, words)


def check_exact(answer: dict, words: str) -> None:
    for quoted in answer["passages"] + answer["evidence"]:
        assert words[quoted["start"] : quoted["end"]] == quoted["text"]


def test_a_killed_server_goes_on_from_the_last_checkpoint_to_the_same_files(recovered: Recovered) -> None:
    server, done = recovered.server, sum(segment["tokens"] for segment in recovered.checkpoint["segments"])
    with server.client() as client:
        events = follow(client, "long")
    assert events[-1][0] == "ready", events[-1]
    total = events[-1][1]["tokens"]
    assert total > 80_000 and 0 < done < total
    assert events[-1][1]["version"] == recovered.folder.name
    resumed = segment_files(server.manifest("long", recovered.folder.name)["documents"][0]["segments"])
    assert len(recovered.written) >= 3 and resumed.keys() > recovered.written.keys()
    for path, before in recovered.written.items():
        assert told_apart(server.storage / "memories" / path) == before, f"{path} was written again"
    for path, digest in resumed.items():
        assert hashlib.sha256((server.storage / "memories" / path).read_bytes()).hexdigest() == digest
    assert not (recovered.folder / "checkpoint.json").exists()

    again = memorize(server, [{"id": "long", "text": LONG}], id="again")
    uninterrupted = server.manifest("again", again["version"])
    killed = server.manifest("long", recovered.folder.name)
    assert list(segment_files(uninterrupted["documents"][0]["segments"]).values()) == list(resumed.values())
    assert uninterrupted["head"]["digest"] == killed["head"]["digest"]
    assert uninterrupted["documents"][0]["passage_count"] == killed["documents"][0]["passage_count"]
    with server.client() as client:
        for memory in ("long", "again"):
            check_whole(ask(client, memory), memory, LONG)


def test_a_text_longer_than_a_prompt_is_asked_in_groups(recovered: Recovered) -> None:
    server, slots = recovered.server, 0
    for segment in server.manifest("long", recovered.folder.name)["documents"][0]["segments"]:
        assert 0 < segment["slots"] < PROMPT
        slots += segment["slots"]
    assert slots > 2 * PROMPT
    kinds = 3
    with server.client() as client:
        recalled = client.post("/v1/memories/long/clues", json={"question": QUESTION}).json()
        assert recalled["usage"]["recall_prompt_tokens"] > kinds * slots, "not all of the memory was asked"
        check_whole(ask(client, "long"), "long", LONG)
        alone = ask(client, "long", "memory")
        assert alone.status_code == 422 and "memorag" in alone.json()["detail"], alone.text
        both = client.post("/v1/answer", json={"question": QUESTION, "memories": ["long", "asked"], "max_tokens": 8})
        assert both.status_code == 200 and both.json()["degraded"] == ["embedded-model"], both.text
        assert [memory["id"] for memory in both.json()["memories"]] == ["long", "asked"]
        texts = {"long": LONG, **SHORT}
        for passage in both.json()["passages"]:
            assert texts[passage["memory"]][passage["start"] : passage["end"]] == passage["text"]


def test_all_memories_are_there_after_a_kill(recovered: Recovered) -> None:
    with recovered.server.client() as client:
        listed = {memory["id"]: memory for memory in client.get("/v1/memories").json()["memories"]}
        for name, version in recovered.versions.items():
            assert (listed[name]["status"], listed[name]["version"]) == ("ready", version)
            assert client.get(f"/v1/memories/{name}/documents/{name}").text == SHORT[name]
        for task in TASKS:
            check_whole(ask(client, "asked", task), "asked", SHORT["asked"])


def test_storage_that_is_gone_for_a_while(recovered: Recovered) -> None:
    """What is in the node's memory is asked as before; what is not says so, and is as it was when storage is back."""
    memories, away = recovered.server.storage / "memories", recovered.server.storage / "away"
    before = sorted(path.relative_to(memories) for path in memories.rglob("*"))
    with recovered.server.client() as client:
        for task in TASKS:
            check_whole(ask(client, "asked", task), "asked", SHORT["asked"])
        memories.rename(away)
        try:
            for task in TASKS:
                for _ in range(3):
                    check_whole(ask(client, "asked", task), "asked", SHORT["asked"])
                other = ask(client, "unasked", task)
                if other.status_code == 200:
                    assert "recall" in other.json()["degraded"]
                    check_exact(other.json(), SHORT["unasked"])
                else:
                    assert other.status_code >= 500 and other.json()["detail"], other.text
            changed = client.put("/v1/memories/asked/documents/more", json={"text": "Too late."})
            assert changed.status_code >= 500, changed.text
            assert not memories.exists(), f"a root was made anew: {sorted(memories.rglob('*'))}"
        finally:
            away.rename(memories)
        for name in SHORT:
            for task in TASKS:
                check_whole(ask(client, name, task), name, SHORT[name])
            info = client.get(f"/v1/memories/{name}").json()
            assert (info["version"], info["job"], info["error"]) == (recovered.versions[name], None, None)
    assert sorted(path.relative_to(memories) for path in memories.rglob("*")) == before
