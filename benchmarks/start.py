"""What `memorag up` spends its seconds on: each process's computing, what of that is imports, and when each was ready.

The server is started twice: for the times, and once more with Python's own report of imports, which slows it a little.
A replica's row has its vLLM engine's processes with it; `engine_s` is their share. Imports are seconds as the clock
has them, so that with more processes than cores they look longer than what they compute.

python -m benchmarks.start [--profile embedded] [--json FILE]
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import make_parser, report, say
from serving.deploy import daemon

_TICK_S = 0.2
_IMPORT = re.compile(r"^import time:\s+(\d+) \|", re.MULTILINE)
_READY = re.compile(r"^memorag: (\w+) ready (\d+) s$", re.MULTILINE)
_SHOWN_S = 0.2  # of computing; what takes less is one row
_RAY = {"gcs_server", "raylet", "monitor.py", "log_monitor.py", "dashboard.py", "agent.py", "main.py"}


@dataclass
class Process:
    """One process of the start, with what it started itself if that is an engine."""

    name: str
    begins_s: float
    cpu_s: dict[int, float] = field(default_factory=dict)  # by process id, its own first
    imports_s: float = 0.0


@dataclass
class Start:
    """One start of a server."""

    wall_s: float
    processes: dict[int, Process]
    ready_s: dict[str, float]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--profile", default="embedded")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    say("starting a server")
    start = _start(arguments.profile, imports=False)
    say("starting it again, with a report of imports")
    imports: dict[str, float] = {}
    for process in _start(arguments.profile, imports=True).processes.values():
        imports[process.name] = imports.get(process.name, 0.0) + process.imports_s
    rows: list[dict[str, Any]] = []
    small = 0.0
    for process in sorted(start.processes.values(), key=lambda each: each.begins_s):
        own, *engine = process.cpu_s.values()
        if own + sum(engine) < _SHOWN_S:
            small += own + sum(engine)
            continue
        row = {"process": process.name, "begins_s": process.begins_s, "cpu_s": own + sum(engine)}
        row |= {"imports_s": imports.get(process.name, 0.0), "engine_s": sum(engine)}
        rows.append(row | {"ready_s": start.ready_s.get(process.name, "")})
    rows.append({"process": "others", "cpu_s": small})
    cpu_s = sum(row["cpu_s"] for row in rows)
    cores = os.cpu_count() or 1
    ratios = {
        "wall_s": start.wall_s,
        "cpu_s": cpu_s,
        "imports_s": sum(imports.values()),
        "ray_cpu_s": sum(row["cpu_s"] for row in rows if row["process"].startswith("Ray")),
        "engine_cpu_s": sum(row.get("engine_s", 0.0) for row in rows),
        "waiting_core_s": max(0.0, cores * start.wall_s - cpu_s),  # idle, or other processes'
        "load_before": load,
    }
    report("start", rows, ratios, arguments.json)


def _start(profile: str, *, imports: bool) -> Start:
    with tempfile.TemporaryDirectory(prefix="memorag-start-") as folder:
        storage = Path(folder)
        command = [sys.executable, "-m", "serving.cli.main", "up", "--profile", profile, "--port", "0"]
        environment = os.environ | ({"PYTHONPROFILEIMPORTTIME": "1"} if imports else {})
        begun = time.time()
        with (storage / "up.log").open("wb") as log:
            up = subprocess.Popen([*command, "--storage", folder], stdout=log, stderr=log, env=environment)
        try:
            processes: dict[int, Process] = {}
            while up.poll() is None:
                _sample(processes, psutil.Process(up.pid), begun)
                time.sleep(_TICK_S)
            wall_s = time.time() - begun
            state = daemon.state_of(storage)
            if up.returncode or state is None:
                raise RuntimeError((storage / "up.log").read_text())
            if imports:
                _add_imports(processes, storage, Path(state.temporary))
            said = (storage / "server.log").read_text(encoding="utf-8", errors="replace")
            return Start(wall_s, processes, {name: float(seconds) for name, seconds in _READY.findall(said)})
        finally:
            daemon.stop(storage)


def _sample(processes: dict[int, Process], up: psutil.Process, begun: float) -> None:
    try:
        family = [up, *up.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        try:
            times, parent, title = each.cpu_times(), each.ppid(), " ".join(each.cmdline())
            created = each.create_time()
        except psutil.NoSuchProcess:
            continue
        ancestor = next((pid for pid, process in processes.items() if parent in process.cpu_s), None)
        if ancestor is not None and processes[ancestor].name in ("Recaller", "Generator"):
            owner = processes[ancestor]
        else:
            owner = processes.setdefault(each.pid, Process("", created - begun))
            owner.name = _name(title) or owner.name
        owner.cpu_s[each.pid] = times.user + times.system


def _name(title: str) -> str:
    if title.startswith("ray::"):
        actor = title.removeprefix("ray::").split(".")[0].strip()
        return actor.rsplit(":", 1)[1] if ":" in actor else f"Ray {actor}" if "Catalog" not in actor else actor
    words = title.split()
    if found := next((Path(word).name for word in words if Path(word).name in _RAY), None):
        return f"Ray {found}"
    modules = {"serving.cli.main": "memorag up", "serving.deploy.daemon": "server", "serving.deploy.traces": "guard"}
    return next((name for module, name in modules.items() if module in words), words[0] if words else "")


def _add_imports(processes: dict[int, Process], storage: Path, temporary: Path) -> None:
    """Workers' reports are in logs that end with their process id, the server's own in its log."""
    logs = {"memorag up": storage / "up.log", "server": storage / "server.log"}
    for process in processes.values():
        if process.name in logs:
            process.imports_s = _seconds(logs[process.name])
    for log in (temporary / "session_latest" / "logs").glob("worker-*.err"):
        pid = int(log.stem.rsplit("-", 1)[1])
        if pid in processes:
            processes[pid].imports_s = _seconds(log)


def _seconds(log: Path) -> float:
    return sum(map(int, _IMPORT.findall(log.read_text(encoding="utf-8", errors="replace")))) / 1e6


if __name__ == "__main__":
    main()
