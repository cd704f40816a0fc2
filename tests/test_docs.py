"""The generated pages say what the code says."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", sorted(generate.PAGES))
def test_the_page_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == generate.PAGES[name](), f"run `make docs`: {name} is stale"


def test_every_setting_says_what_it_means():
    for line in generate.configuration().splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), line


def test_every_promise_names_tests_that_are_there():
    tests = Path(__file__).parent
    page = (DOCS / "durability.md").read_text(encoding="utf-8")
    table = page.partition("## What is promised?")[2].partition("\n## ")[0]
    promises = [line for line in table.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(promises) > 20
    for line in promises:
        names = re.findall(r"`(\S+?\.py|…)(?:::(test_\w+))?`", line.rpartition(" | ")[2])
        assert names, line
        for file, function in names:
            path = tests / file if file != "…" else path  # noqa: F821  the one before
            assert path.is_file(), line
            assert f"def {function or 'test_'}" in path.read_text(encoding="utf-8"), f"{function} is not in {path}"
