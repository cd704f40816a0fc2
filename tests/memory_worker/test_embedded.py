import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from memory_worker.embedded import ensure_embedded_model, is_trained

_MAKE = "import sys; from memory_worker.embedded import ensure_embedded_model as make; print(make(sys.argv[1]))"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_embedded_model(tmp_path_factory.mktemp("embedded"))


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_two_processes_at_once_make_one_model_with_the_same_bytes_as_ever(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "shared"
    both = [
        subprocess.Popen([sys.executable, "-c", _MAKE, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    made = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert made == {str(folder / model.name)}
    assert list(folder.iterdir()) == [folder / model.name]  # nothing temporary is left
    assert _digests(folder / model.name) == _digests(model)


def test_an_existing_model_is_not_made_again(model: Path) -> None:
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert ensure_embedded_model(model.parent) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before


def test_it_says_that_it_is_untrained(model: Path, tmp_path: Path) -> None:
    assert not is_trained(model)
    (tmp_path / "config.json").write_text("{}")
    assert is_trained(tmp_path)
    assert is_trained("organisation/model-on-a-hub")


def test_importing_it_loads_no_heavy_library() -> None:
    check = (
        "import sys, memory_worker.embedded; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_transformers_generates_valid_lines_of_text_with_it(model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    parameters = sum(p.numel() for p in language_model.parameters())
    assert 4e6 < parameters < 6e6
    texts = []
    for prompt in ("Who opened the gate?", "In the beginning", "谁打开了门？"):
        assert tokenizer.decode(tokenizer.encode(prompt)) == prompt
        tokens = tokenizer(prompt, return_tensors="pt")
        new = language_model.generate(**tokens, do_sample=False, max_new_tokens=160)[0, tokens.input_ids.shape[1] :]
        texts.append(tokenizer.decode(new))
    assert len(set(texts)) == len(texts)
    assert all("\ufffd" not in text and text.strip() for text in texts)
    assert any("\n" in text for text in texts)
