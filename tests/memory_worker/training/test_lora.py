"""Adapters on checkpoints of others' making: they learn, they resume, and what results is a plain checkpoint."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from benchmarks.support.random_model import ensure_random_model
from memory_worker.training import RunConfig, TrainingError
from memory_worker.training.config import DataConfig, StageConfig
from memory_worker.training.data import Source
from memory_worker.training.loop import Loop, Stopped
from memory_worker.training.state import RunFolder, read_weights
from tests.support.stock_models import add_beacons, write_model
from tests.support.training_runs import write_documents

COLOURS = ("red", "blue", "green", "grey")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_random_model(tmp_path_factory.mktemp("tokenizer"))


def write_conversations(folder: Path) -> Path:
    """Several questions on one reading each, as JSON Lines; every other line is a conversation alone."""
    lines: list[dict[str, Any]] = []
    for seed in range(6):
        shown = random.Random(seed).sample(COLOURS, 4)
        told = " ".join(f"Door {n} is {colour}." for n, colour in enumerate(shown))
        asked = [(f"{told}\n\nQuestion: Which colour is door {n}?", f"{shown[n]} [{n + 1}]") for n in range(4)]
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in asked]
        lines += [{"shared": [{"messages": turn} for turn in turns]}, {"messages": turns[0]}]
    file = folder / "conversations.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def lora_run(folder: Path, model: Path, **changes: Any) -> RunConfig:
    """A run of adapters on passages and on memory."""
    conversations = {"kind": "conversations", "files": [str(write_conversations(folder))], "lead": ""}
    documents = {
        "kind": "documents",
        "files": [str(write_documents(folder / "documents"))],
        "tasks": {"span": 1, "answer": 1, "key_point": 1},
        "unknown": 0.3,
        "lead": "",
        "raw": True,
    }
    stage = {
        "name": "both",
        "data": [conversations, documents],
        "texts": 1,
        "accumulate": 2,
        "steps": 8,
        "tokens": 160,
        "questions": 3,
        "ratios": [0],
        "learning_rate": 0.01,
        "warmup_steps": 2,
    }
    settings = {"output": str(folder / "run"), "model": str(model), "parameters": "lora", "threads": 1, "log_every": 2}
    return RunConfig.model_validate({**settings, "lora": {"rank": 4}, "stages": [stage], **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_a_plain_checkpoint_that_says_what_model_and_adapter_say(tmp_path, tokenizer_folder, family):
    from peft import PeftModel

    changes: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    begun = write_model(tmp_path / family, family, tokenizer_folder, **changes)
    run = lora_run(tmp_path, begun, log_every=20)
    stage = run.stages[0].model_copy(update={"steps": 60})
    result = Loop(run.model_copy(update={"stages": (stage,)})).train()
    first, *_, last = RunFolder(run.output).progress()
    assert last["loss"] < 0.7 * first["loss"]

    before, after = read_weights(begun), read_weights(result)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert (
        json.loads((begun / "config.json").read_text()).items()
        <= json.loads((result / "config.json").read_text()).items()
    )
    tokens = torch.tensor([AutoTokenizer.from_pretrained(result).encode("Door 2 is red. Which colour is door 2?")])
    base = AutoModelForCausalLM.from_pretrained(begun, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32)(tokens).logits
    assert not torch.allclose(base(tokens).logits, merged, atol=0.1)
    adapted = PeftModel.from_pretrained(base, Path(run.output, "adapter"))(tokens).logits
    torch.testing.assert_close(adapted, merged, atol=0.05, rtol=0.05)  # adapters are kept in bfloat16

    from serving.cli.main import app

    out = tmp_path / "merged"
    made = CliRunner().invoke(app, ["train", "merge", str(begun), str(Path(run.output, "adapter")), "--out", str(out)])
    assert made.exit_code == 0, made.output
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(adapted, again, atol=1e-3, rtol=1e-3)
    made = CliRunner().invoke(app, ["train", "merge", str(begun), str(begun), "--out", str(tmp_path / "none")])
    assert made.exit_code == 1 and "holds no LoRA adapter" in made.stderr


def test_conversations_that_begin_alike_are_read_once_and_weigh_what_they_weigh_alone(tmp_path, tokenizer_folder):
    model = write_model(tmp_path / "llama", "llama", tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = DataConfig(kind="conversations", files=(str(write_conversations(tmp_path)),), lead="")
    stage = StageConfig(name="any", data=(data,), steps=1, questions=3, texts=1, ratios=(0,), tokens=400)
    source = Source(data, tokenizer)
    examples = [source.examples(random.Random(seed), 1, stage, 400)[0] for seed in range(8)]
    shared = next(example for example in examples if len(example.tails) == 3)
    assert len(shared.text) > 20
    for ids, prompt in shared.tails:
        whole = tokenizer.decode([*shared.text, *ids])
        question, reply = whole.split("Question: ")[1].split("<|im_end|>")[:2]
        number = int(question.removesuffix("?").split()[-1])
        assert f"Door {number} is {reply.split()[-2]}." in whole and reply.endswith(f"[{number + 1}]")
        assert tokenizer.decode(ids[prompt:]) == f"{reply.split('assistant')[-1].strip()}<|im_end|>"
    with pytest.raises(TrainingError, match="texts: 1"):
        [source.examples(random.Random(seed), 2, stage.model_copy(update={"texts": 2}), 400) for seed in range(8)]
    with pytest.raises(TrainingError, match="raise the stage's tokens"):
        [source.examples(random.Random(seed), 1, stage.model_copy(update={"tokens": 9}), 9) for seed in range(8)]

    from memory_worker.training.data import collate
    from memory_worker.training.model import TrainedModel
    from memory_worker.training.state import load_beginning

    config, weights = load_beginning(model, beacons=False)
    trained = TrainedModel(config, beacons=False)
    trained.load_state_dict(weights)
    loss, _, _ = trained(collate([shared], 400, [0], 0.0))
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    alone = 0.0
    for ids, prompt in shared.tails:
        tokens = torch.tensor([[*shared.text, *ids]])
        logits = stock(tokens).logits[0, -(len(ids) - prompt) - 1 : -1]
        alone += float(torch.nn.functional.cross_entropy(logits, tokens[0, -(len(ids) - prompt) :], reduction="sum"))
    assert float(loss) == pytest.approx(alone, rel=1e-4)


def test_of_what_was_not_read_there_is_no_clue_and_the_answer_says_so(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "llama", "llama", tokenizer_folder))
    data = lora_run(tmp_path, tmp_path / "llama").stages[0].data[1].model_copy(update={"unknown": 0.9})
    for task, wanted in (("span", ""), ("draft", ""), ("answer", "The text does not say.")):
        source = Source(data.model_copy(update={"tasks": {task: 1}}), tokenizer)
        stage = StageConfig(name="any", data=(data,), steps=1, questions=6, ratios=(0,))
        tails = [tail for seed in range(6) for tail in source.examples(random.Random(seed), 1, stage, 100)[0].tails]
        said = [tokenizer.decode(ids[prompt:]) for ids, prompt in tails]
        assert f"{wanted}<|im_end|>" in said and len({*said}) > 1


def test_a_stopped_run_of_adapters_equals_one_that_was_not_and_its_checkpoints_are_small(tmp_path, tokenizer_folder):
    begun = write_model(tmp_path / "llama", "llama", tokenizer_folder)
    whole, cut = (lora_run(tmp_path, begun, output=str(tmp_path / name)) for name in ("whole", "cut"))
    Loop(whole).train()
    steps = iter(range(99))
    with pytest.raises(Stopped):
        Loop(cut, stop=lambda: next(steps) == 4).train()
    held = read_weights(RunFolder(cut.output).latest())
    assert held and all(".lora_" in name for name in held)
    Loop(cut).train()
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert Path(whole.output, name).read_bytes() == Path(cut.output, name).read_bytes(), name


def test_a_killed_run_of_adapters_goes_on(tmp_path, tokenizer_folder):
    begun = write_model(tmp_path / "llama", "llama", tokenizer_folder)
    cut = lora_run(tmp_path, begun, output=str(tmp_path / "cut"), save_every_s=1e-6)
    endless = cut.stages[0].model_copy(update={"steps": 10**6, "final_rate": 1.0})
    endless_run = cut.model_copy(update={"stages": (endless,)})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(json.loads(endless_run.model_dump_json()), sort_keys=False))
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "serving.cli.main", "train", str(file), "--in-process"]
    process = subprocess.Popen(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL
    )
    while not RunFolder(cut.output).latest():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    steps = int(RunFolder(cut.output).latest().name) + 2
    stages = (endless.model_copy(update={"steps": steps}),)
    whole = cut.model_copy(update={"stages": stages, "output": str(tmp_path / "whole")})
    for run in (cut.model_copy(update={"stages": stages}), whole):
        Loop(run).train()
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert Path(whole.output, name).read_bytes() == Path(cut.output, name).read_bytes(), name


def test_beacons_stay_with_a_model_that_has_them_and_are_missed_in_one_that_has_none(tmp_path, tokenizer_folder):
    begun = write_model(tmp_path / "llama", "llama", tokenizer_folder)
    run = lora_run(tmp_path, begun)
    data = run.stages[0].data[1].model_copy(update={"raw": False})
    stage = run.stages[0].model_copy(update={"data": (data,), "ratios": (4,), "window": 64, "steps": 2})
    with pytest.raises(TrainingError, match=r"no beacons to compress a text with: set ratios: \[0\]"):
        Loop(run.model_copy(update={"stages": (stage,)})).train()
    with_beacons = add_beacons(begun)
    other = run.model_copy(update={"stages": (stage,), "output": str(tmp_path / "other")})
    before, after = read_weights(with_beacons), read_weights(Loop(other).train())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "beacon" in name)


def test_what_cannot_be_adapted_is_said(tmp_path, tokenizer_folder):
    run = lora_run(tmp_path, tmp_path)
    grown = run.stages[0].model_copy(update={"grow": {"layers": 4}})
    with pytest.raises(ValueError, match="adapters do not grow a model"):
        RunConfig.model_validate({**run.model_dump(), "stages": [grown.model_dump()]})
