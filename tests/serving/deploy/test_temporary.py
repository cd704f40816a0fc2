"""A server that is measured ends with the measurement, while the loop of its handles still runs."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.config import load_profile
from serving.deploy import temporary


@pytest.mark.parametrize("fails", [False, True])
def test_the_server_ends_with_what_measures_it(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def deploy(profile: object, storage: str, host: str, port: int) -> SimpleNamespace:
        seen.append(Path(storage))
        return SimpleNamespace(address=f"http://{host}", stop=lambda: seen.append(asyncio.get_running_loop()))

    async def measure(address: str, storage: str) -> str:
        assert Path(storage) == seen[0] and Path(storage).is_dir()  # noqa: ASYNC240
        seen.append(asyncio.get_running_loop())
        if fails:
            raise ArithmeticError
        return address

    monkeypatch.setattr(temporary, "deploy", deploy)
    if fails:
        with pytest.raises(ArithmeticError):
            temporary.measure_on_server(load_profile("embedded"), measure)
    else:
        assert temporary.measure_on_server(load_profile("embedded"), measure) == "http://127.0.0.1"
    storage, measured_on, stopped_on = seen
    assert measured_on is stopped_on and not storage.exists()
