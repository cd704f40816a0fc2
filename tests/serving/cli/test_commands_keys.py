"""`memorag keys`: what goes to stdout, what to stderr, and what can go wrong."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.storage.durable import Storage as StorageRoot
from serving.cli.keys import app
from serving.deploy.app import memories_root
from serving.http.keys import Authenticator


def keys(*arguments: str, storage: Path) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"MEMORAG_STORAGE": str(storage), "COLUMNS": "200"})


def test_create_shows_the_key_alone_on_stdout(tmp_path: Path) -> None:
    done = keys("create", "library", "--note", "desk 3", storage=tmp_path)
    assert done.exit_code == 0
    assert done.stdout.startswith("mr_") and done.stdout.count("\n") == 1 and len(done.stdout.split()) == 1
    assert "only now" in done.stderr and done.stdout.strip() not in done.stderr
    listed = keys("list", storage=tmp_path)
    assert listed.stdout.split()[:2] == [done.stdout.split("_")[1], "library"] and "desk 3" in listed.stdout
    assert done.stdout.strip() not in listed.stdout


def test_json(tmp_path: Path) -> None:
    made = json.loads(keys("create", "library", "--json", storage=tmp_path).stdout)
    assert made["key"].split("_")[1] == made["id"] and made["tenant"] == "library"
    [entry] = json.loads(keys("list", "--json", storage=tmp_path).stdout)["keys"]
    assert entry["id"] == made["id"] and set(entry) == {"id", "tenant", "created", "note"}
    assert json.loads(keys("revoke", made["id"], "--json", storage=tmp_path).stdout) == {"revoked": entry}
    assert json.loads(keys("list", "--json", storage=tmp_path).stdout) == {"keys": []}


def test_revoke(tmp_path: Path) -> None:
    id = keys("create", "library", storage=tmp_path).stdout.split("_")[1]
    assert keys("revoke", id, storage=tmp_path).stdout == f"revoked {id} of library\n"
    empty = keys("list", storage=tmp_path)
    assert empty.stdout == "" and "memorag keys create TENANT" in empty.stderr
    again = keys("revoke", id, storage=tmp_path)
    assert again.exit_code == 1 and again.stdout == "" and again.stderr.startswith(f"error: there is no key '{id}'")


@pytest.mark.parametrize("command", [["create", "../x"], ["list"], ["create", "a"], ["revoke", "00000000"]])
def test_errors_are_one_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "memories").mkdir()
    (tmp_path / "memories" / "keys.json").write_text("{")
    done = keys(*command, storage=tmp_path)
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["create"], ["revoke"], ["bogus"]])
def test_wrong_usage_exits_2(command: list[str], tmp_path: Path) -> None:
    assert keys(*command, storage=tmp_path).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_the_server_on_this_storage_finds_them(tmp_path: Path) -> None:
    key = keys("create", "library", storage=tmp_path).stdout.strip()
    authenticator = Authenticator(StorageRoot(memories_root(str(tmp_path))), "keys")
    assert asyncio.run(authenticator.tenant_of(f"Bearer {key}")) == "library"


def test_a_storage_root_may_be_a_uri(tmp_path: Path) -> None:
    assert keys("create", "a", "--storage", f"file://{tmp_path}/bucket", storage=tmp_path).exit_code == 0
    assert (tmp_path / "bucket" / "keys.json").exists()


def test_importing_it_is_light_and_using_it_needs_no_ray(tmp_path: Path) -> None:
    code = "import sys, serving.cli.keys as c; early = set(sys.modules); "
    code += f"c._key_file({str(tmp_path)!r}).entries(); "
    code += "print({'pyarrow', 'ray', 'torch', 'pydantic'} & early, {'ray', 'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() set()\n"
