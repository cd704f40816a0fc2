"""The pinned lists: one place for versions, and the digests of the files that they mean."""

import re
from pathlib import Path

import pytest

LISTS = Path(__file__).parents[2] / "cluster" / "requirements"


def pins(name: str) -> list[str]:
    return [line.split()[0] for line in (LISTS / name).read_text(encoding="utf-8").splitlines() if "==" in line]


@pytest.mark.parametrize("name", ["cpu", "gpu", "dev"])
def test_every_pinned_version_has_its_digests(name):
    assert sorted(pins(f"{name}.lock")) == sorted(pins(f"{name}.txt")), "run `make lock`"
    blocks = re.split(r"^(?=\S)", (LISTS / f"{name}.lock").read_text(encoding="utf-8"), flags=re.M)
    lacking = [block for block in blocks if block.strip() and not re.search(r"--hash=sha256:[0-9a-f]{64}", block)]
    assert not lacking, "run `make lock`"


def test_no_package_is_pinned_twice():
    for extra in ("cpu", "gpu"):
        names = [pin.split("==")[0] for pin in [*pins(f"{extra}.txt"), *pins("dev.txt")]]
        assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
