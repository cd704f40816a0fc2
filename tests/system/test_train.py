"""`memorag train` on Ray Train: two workers to the end of a run, one of them killed on the way."""

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from memory_worker.models.beacon import BeaconModel
from tests.support.processes import title_of
from tests.support.server import MEMORAG, ROOT
from tests.support.training_runs import tiny_run
from tests.support.waiting import wait_until


@pytest.mark.long
def test_a_run_of_two_workers_outlives_one_of_them(tmp_path):
    run = tiny_run(tmp_path, workers=2, save_every_s=0.01, log_every=5)
    short, wider = run.stages
    run = run.model_copy(update={"stages": (short.model_copy(update={"steps": 30}), wider)})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    progress = Path(run.output) / "progress.jsonl"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with (tmp_path / "printed").open("w") as printed:
        training = subprocess.Popen(
            [MEMORAG, "train", str(file), "--json"], stdout=printed, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        try:
            wait_until(lambda: progress.is_file() and len(lines(progress)) >= 2)
            killed = worker_of(training.pid)
            killed.kill()
            assert training.wait() == 0, (tmp_path / "printed").read_text()
        finally:
            training.kill()
    seen = lines(progress)
    # What was done after the last checkpoint was done again, and is there once.
    assert [line["total_steps"] for line in seen] == [*range(5, 39, 5)]
    assert seen[-1]["stage"] == "wider" and seen[-1]["loss"] < seen[0]["loss"]
    assert seen[-1]["tokens"] > 1.9 * 35 * 4 * 48  # both workers' texts count
    assert BeaconModel.from_pretrained(Path(run.output, "model")).shape.hidden == 40
    assert not killed.is_running()


def lines(progress: Path) -> list[dict]:
    return [json.loads(line) for line in progress.read_text().splitlines()]


def worker_of(pid: int) -> psutil.Process:
    """One process that trains, of those that the command started."""
    family = psutil.Process(pid).children(recursive=True)
    found = [process for process in family if "RayTrainWorker" in title_of(process)]
    assert len(found) == 2, [title_of(process) for process in family]
    return found[-1]
