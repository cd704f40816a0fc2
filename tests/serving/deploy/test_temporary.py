"""A server that is measured ends with the measurement, while the loop of its handles still runs."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.config import load_profile
from serving.deploy import temporary
from tests.support.waiting import wait_until

MEASURE = """
import signal
from pathlib import Path
from serving.config import load_profile
from serving.deploy import temporary, traces

def deploy(profile, storage, host, port, *, ray_folder):
    traces.watch_over(ray_folder)  # as the start of Ray does
    Path(storage).mkdir()
    print(storage, flush=True)
    signal.pause()

temporary.deploy = deploy
temporary.measure_on_server(load_profile("embedded"), None)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_the_server_ends_with_what_measures_it(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def deploy(profile: object, storage: str, host: str, port: int, *, ray_folder: Path) -> SimpleNamespace:
        Path(storage).mkdir()
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
    assert measured_on is stopped_on and not storage.parent.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_measurement_that_is_interrupted_leaves_no_storage(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", MEASURE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        storage = Path(process.stdout.readline().strip())
        assert storage.is_dir()
        process.send_signal(number)
        if number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
            process.kill()  # a shell's background job ignores it, and so does what it starts
    wait_until(lambda: not storage.parent.exists())
