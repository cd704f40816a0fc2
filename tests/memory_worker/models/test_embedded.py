"""The embedded model is shipped whole, says what it knows, and quotes from a memory what it has read there."""

import subprocess
import sys
from pathlib import Path

from memory_worker.models.embedded import FOLDER, KNOWS, knows_chronicles_only


def test_it_says_that_it_knows_chronicles_alone(tmp_path: Path) -> None:
    assert knows_chronicles_only(FOLDER)
    (tmp_path / "config.json").write_text("{}")
    assert not knows_chronicles_only(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"{KNOWS}": "letters"}}')
    assert not knows_chronicles_only(tmp_path)
    assert not knows_chronicles_only("organisation/model-on-a-hub")


def test_importing_it_loads_no_heavy_library() -> None:
    check = (
        "import sys, memory_worker.models.embedded; print({'torch', 'numpy', 'transformers'} & set(sys.modules) or [])"
    )
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 40 * 2**20
