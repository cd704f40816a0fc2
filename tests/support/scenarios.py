"""Scenarios run in a process of their own, since an engine in one process needs variables that hold for all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_scenario(name: str, folder: Path, *arguments: Path | str) -> dict[str, Any]:
    """What the module `name` beside this one prints after `SEEN`, run with `folder` and its other `arguments`.

    Temporary files go to `folder`, too: vLLM leaves its sockets behind.
    """
    command = [sys.executable, "-m", f"tests.support.{name}", str(folder), *map(str, arguments)]
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    reports = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert reports, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(reports[0].removeprefix("SEEN "))
    return found
