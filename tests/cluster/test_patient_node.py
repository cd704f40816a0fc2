"""A Ray node that a busy machine starts slowly is waited for; one whose process has ended is not."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ray._private import services, utils

from cluster.ray_internals import patient_node


@contextmanager
def process_of(node_id: str) -> Iterator[Any]:
    """A process that is called as a node's is, and does nothing until it is ended."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", f"--node_id={node_id}"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def raylet() -> Iterator[Any]:
    with process_of("node") as process:
        yield process


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
    with process_of("another"), patient_node(), pytest.raises(RuntimeError, match="never"):
        services.get_node("here", "node")


def test_a_process_that_starts_a_node_keeps_its_own_way_to_end():
    before = signal.getsignal(signal.SIGTERM)
    with patient_node():
        utils.set_sigterm_handler(lambda number, _: None)  # as `ray.init` does
        assert signal.getsignal(signal.SIGTERM) is before
