"""The process that memorizes is killed, and the job goes on from its last checkpoint to the same files."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.support.chaos import text
from tests.support.processes import kill_part
from tests.support.server import Server, follow, segment_files
from tests.support.waiting import wait_until

TEXT = text("killed", 2000)  # some 60,000 tokens, of which every 4,096 are written


@pytest.mark.long
def test_a_job_whose_memorizer_is_killed_goes_on_to_the_same_files(server: Server) -> None:
    with server.client() as client:
        begun = client.post("/v1/memories", json={"id": "killed", "documents": [{"id": "killed", "text": TEXT}]})
        assert begun.status_code == 202, begun.text
        folder = server.storage / "memories" / "default" / "killed" / begun.json()["version"]
        checkpoint = folder / "checkpoint.json"
        wait_until(checkpoint.exists, progress=lambda: client.get("/v1/memories/killed").json()["job"])
        kill_part(json.loads((server.storage / "server.json").read_text()), "Memorizer")
        assert not (folder / "manifest.json").exists(), "it was killed too late"
        segments = json.loads(checkpoint.read_text())["segments"]
        written = {path: changed_at(server.storage / "memories" / path) for path in segment_files(segments)}

        name, made = follow(client, "killed")[-1]
        assert name == "ready" and 0 < sum(segment["tokens"] for segment in segments) < made["tokens"]
        assert made["version"] == folder.name
        files = segment_files(server.manifest("killed", folder.name)["documents"][0]["segments"])
        assert written and files.keys() > written.keys()
        for path, before in written.items():
            assert changed_at(server.storage / "memories" / path) == before, f"{path} was written again"
        for path, digest in files.items():
            assert hashlib.sha256((server.storage / "memories" / path).read_bytes()).hexdigest() == digest
        question = {"question": "What stood by the lantern of the harbour?", "max_tokens": 4}
        answer = client.post("/v1/memories/killed/answer", json=question).json()
        assert answer["degraded"] == ["embedded-model"] and answer["passages"]
        assert client.delete("/v1/memories/killed").status_code == 204


def changed_at(path: Path) -> tuple[int, int]:
    """Tells a file from one that was written in its place."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
