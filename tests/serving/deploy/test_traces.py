"""What a killed server started ends with it."""

import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.waiting import wait_until

BEGIN = """
import subprocess, sys
from pathlib import Path
from serving.deploy.traces import watch_over
watch_over(Path(sys.argv[1]))
print(subprocess.Popen(["sleep", "infinity"], env={"FOLDER": sys.argv[1]}, start_new_session=True).pid, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_started_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    command = [sys.executable, "-c", BEGIN, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        left = psutil.Process(int(process.stdout.readline()))
        assert left.is_running() and folder.is_dir()
        process.kill()
    wait_until(lambda: not folder.exists())
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
