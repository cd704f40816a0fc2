"""What docs/quality.md tells people to type is what the command takes."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from serving.cli.main import app
from serving.config import load_profile
from serving.evaluation.datasets import _INFINITEBENCH, _LONGBENCH
from serving.evaluation.methods import METHODS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^memorag (evaluate .+)$", PAGE, re.MULTILINE)


def test_every_command_names_options_methods_and_profiles_that_are_there():
    command = typer.main.get_group(app).commands["evaluate"]
    options = {name for parameter in command.params for name in parameter.opts}
    assert len(COMMANDS) == 4 and "--cited" in options
    for line in map(shlex.split, COMMANDS):
        words = [word for word in line if word != "--cited"]
        first = next(place for place, word in enumerate(words) if word.startswith("--"))
        assert first in (2, 3), "the dataset, and perhaps a folder"
        given = dict(zip(words[first::2], words[first + 1 :: 2], strict=True))
        assert set(given) <= options, given
        assert set(given["--tasks"].split(",")) <= set(METHODS)
        profile = given["--profile"]
        load_profile(str(ROOT / profile) if "/" in profile else profile)


def test_every_row_of_the_papers_table_names_a_part_that_is_read():
    rows = re.findall(r"^\| \S+ \| `(\w+)(?:/data)?` \| `(\w+)` \| \d+ \|", PAGE, re.MULTILINE)
    known = {"LongBench": _LONGBENCH, "InfiniteBench": _INFINITEBENCH}
    assert len(rows) == 13
    assert all(part in known[dataset] for dataset, part in rows if dataset in known)


@pytest.mark.parametrize("method", METHODS)
def test_the_page_explains_every_method(method):
    assert re.search(rf"^\| `{method}` \|", PAGE, re.MULTILINE)
