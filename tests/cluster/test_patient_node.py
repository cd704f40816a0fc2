"""A Ray node that a busy machine starts slowly is waited for; one whose process has ended is not."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray._private import services

from cluster.ray_internals import patient_node


@pytest.fixture
def raylet(tmp_path: Path) -> Any:
    """A process by that name, which does nothing until it is ended."""
    (tmp_path / "raylet").symlink_to("/bin/sleep")
    process = subprocess.Popen([tmp_path / "raylet", "infinity"])
    yield process
    process.kill()
    process.wait()


def test_a_node_that_is_not_there_yet_is_asked_for_again(raylet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([RuntimeError("not yet"), RuntimeError("not yet"), {"node": 1}])

    def ask(gcs_address: str, node_id: str) -> Any:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(services, "get_node", ask)
    with patient_node():
        assert services.get_node("here", "node") == {"node": 1}
    assert services.get_node is ask


def test_a_node_whose_process_has_ended_is_not_waited_for(raylet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(gcs_address: str, node_id: str) -> Any:
        raylet.kill()  # and nobody collects it
        raise RuntimeError("never")

    monkeypatch.setattr(services, "get_node", ask)
    with patient_node(), pytest.raises(RuntimeError, match="never"):
        services.get_node("here", "node")
