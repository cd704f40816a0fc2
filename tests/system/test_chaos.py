"""Every part of the server is killed once while 16 clients ask and change memories: the short form of `make soak`."""

import json

import pytest

from tests.support.chaos import Chaos
from tests.support.processes import PARTS
from tests.support.server import Server


@pytest.mark.long
async def test_every_part_is_killed_under_load(server: Server) -> None:
    """Nothing is lost, no answer is wrong, every failure can be retried, and service comes back; it is left whole."""
    found = await Chaos(server.storage, seed=0).run(list(PARTS), pause_s=1.0)
    assert not found.wrong and not found.lost, found.summary()
    assert [kill.part for kill in found.kills] == list(PARTS)
    start_s = json.loads((server.storage / "server.json").read_text())["ready_s"]
    # An engine's death is noticed by its replica's health check, and is no process of the promise.
    named = [kill for kill in found.kills if not kill.part.endswith("'s engine")]
    assert all(kill.recovery_s < start_s for kill in named), (start_s, found.summary())
    # The load was there, and it did meet the kills.
    assert found.answers > 100 and found.changes > 5 and found.failures.total() > 0, found.summary()
