"""The embedded model is shipped whole, says what it knows, and quotes from a memory what it has read there."""

import subprocess
import sys
from pathlib import Path

from memory_worker.models.embedded import FOLDER, KNOWS, knows_chronicles_only, load_tokenizer


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


def test_its_tokenizer_is_the_one_that_transformers_chooses() -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    for text in (
        (FOLDER.parents[2] / "examples/chronicle.txt").read_text(),
        "<|im_start|>user\nhéllo 你好<|im_end|> \n\n 1 22 333",
        "\ufb01 \u00c5 A\u030a",
    ):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert ours.chat_template == theirs.chat_template and ours.all_special_tokens == theirs.all_special_tokens


def test_loading_it_imports_none_of_what_models_of_transformers_need() -> None:
    code = """import sys
from memory_worker.models.embedded import FOLDER, load_tokenizer
from memory_worker.models.stock import load_memory_model
import torch
load_tokenizer(FOLDER), load_memory_model(FOLDER, dtype=torch.bfloat16, device="cpu")
print(*sys.modules)"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"sklearn", "scipy", "pandas", "sympy", "torch._dynamo", "transformers.modeling_utils"}
    assert "torch" in loaded and heavy.isdisjoint(loaded)
