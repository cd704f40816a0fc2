"""Every command of the README, run against the server that `make up` started."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.server import MEMORAG, ROOT, Server

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [code for name, code in fenced if name == language]


def test_the_two_commands_are_there_alone():
    assert blocks("") == ["make up\n", "make test\n"]


def test_every_shell_command_and_the_python_block(server: Server, chronicle):
    environment = os.environ | {
        "PATH": f"{MEMORAG.parent}{os.pathsep}{os.environ['PATH']}",
        "MEMORAG_URL": server.url,
        "MEMORAG_STORAGE": str(server.storage),
    }
    shell, python = blocks("bash"), blocks("python")
    assert len(shell) == 2 and len(python) == 1
    for block in shell:
        for command in block.strip().splitlines():
            done = subprocess.run(
                ["bash", "-c", command.replace("http://127.0.0.1:8000", server.url)],
                capture_output=True, text=True, env=environment, cwd=ROOT,
            )  # fmt: skip
            assert done.returncode == 0 and done.stdout, f"{command}\n{done.stdout}{done.stderr}"
            assert (
                '"error":{' not in done.stdout and '"status":4' not in done.stdout and '"status":5' not in done.stdout
            ), done.stdout
    code = python[0].replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "the east pier" in done.stdout, done.stderr


def test_every_link_leads_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or Path(page.parent / target).exists(), f"{page.name}: {target}"
