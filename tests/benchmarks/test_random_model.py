"""The random model that tests and benchmarks use is made once, of the same bytes, and writes lines of valid text."""

import hashlib
import subprocess
import sys
from pathlib import Path

_MAKE = "import sys; from benchmarks.support.random_model import ensure_random_model as make; print(make(sys.argv[1]))"
ROOT = Path(__file__).parents[2]


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_two_processes_at_once_make_one_model_with_the_same_bytes_as_ever(tmp_path: Path, random_model: Path) -> None:
    folder = tmp_path / "shared"
    both = [
        subprocess.Popen([sys.executable, "-c", _MAKE, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    made = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert made == {str(folder / random_model.name)}
    assert list(folder.iterdir()) == [folder / random_model.name]  # nothing temporary is left
    assert _digests(folder / random_model.name) == _digests(random_model)


def test_transformers_generates_valid_lines_of_text_with_it(random_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_model)
    language_model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
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
