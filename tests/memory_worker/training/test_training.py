"""Training runs: they learn, they resume bit for bit, they leave alone what they should, and their result is served."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from memory_worker.keeper.keeper import KeptMemory
from memory_worker.manifest import MemoryShape
from memory_worker.messages import SegmentGroup
from memory_worker.models.beacon import BeaconModel
from memory_worker.recall.loading import Expected, LoadFailed, MemoryLoader, SlotRange
from memory_worker.training import RunConfig, TrainingError, load_run
from memory_worker.training.config import DataConfig, StageConfig
from memory_worker.training.data import Example, Source
from memory_worker.training.loop import Loop, Stopped
from memory_worker.training.model import BEACON_MARK
from memory_worker.training.prepare import prepare
from memory_worker.training.state import RunFolder, read_weights
from tests.support.training_runs import tiny_run

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that went through without interruption."""
    run = tiny_run(tmp_path_factory.mktemp("run"))
    Loop(run).train()
    return run


def same_tokenizer(run: RunConfig, other: RunConfig) -> None:
    """`run` is to go the way of `other`, whose documents lie elsewhere but are the same."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert Path(run.output, "tokenizer", name).read_bytes() == Path(other.output, "tokenizer", name).read_bytes()


def test_the_loss_falls_and_the_curve_shows_it(tmp_path):
    run = tiny_run(tmp_path)
    (stage, _) = run.stages
    longer = stage.model_copy(update={"steps": 40, "texts": 6})
    Loop(run.model_copy(update={"stages": (longer,), "log_every": 10})).train()
    progress = RunFolder(run.output).progress()
    assert [line["step"] for line in progress] == [10, 20, 30, 40]
    assert progress[-1]["loss"] < 0.7 * progress[0]["loss"]
    assert progress[-1]["accuracy"] > progress[0]["accuracy"]
    assert progress[-1]["tokens"] > 40 * 6 * 40
    assert "polyline" in Path(run.output, "loss.svg").read_text()


@pytest.mark.parametrize("stops", [(3,), (8, 11)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, finished, stops):
    run = tiny_run(tmp_path)
    for stop in stops:
        steps = iter(
            range(RunFolder(run.output).load(RunFolder(run.output).latest())[0].total_steps if stop > 8 else 0, 99)
        )
        with pytest.raises(Stopped, match="goes on from there"):
            Loop(run, stop=lambda steps=steps, stop=stop: next(steps) + 1 == stop).train()
        assert RunFolder(run.output).latest().name == str(stop)
    Loop(run).train()
    same_tokenizer(run, finished)
    for name in ("model.safetensors", "config.json"):
        assert Path(run.output, "model", name).read_bytes() == Path(finished.output, "model", name).read_bytes(), name
    ours, theirs = (RunFolder(r.output).progress() for r in (run, finished))
    assert [{**line, "seconds": 0} for line in ours] == [{**line, "seconds": 0} for line in theirs]


def test_muon_learns_and_resumes_too(tmp_path):
    whole, cut = (tiny_run(folder, optimizer="muon") for folder in (tmp_path / "whole", tmp_path / "cut"))
    Loop(whole).train()
    steps = iter(range(99))
    with pytest.raises(Stopped):
        Loop(cut, stop=lambda: next(steps) == 5).train()
    moments = RunFolder(cut.output).load(RunFolder(cut.output).latest())[1]
    kinds = {name.rpartition("/")[2] for name in moments if "q_proj.weight" in name or "embed_tokens" in name}
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    Loop(cut).train()
    ours, theirs = (Path(run.output, "model", "model.safetensors").read_bytes() for run in (cut, whole))
    assert ours == theirs
    first, *_, last = RunFolder(whole.output).progress()
    assert last["accuracy"] > first["accuracy"]


def test_training_beacons_leaves_every_other_weight_as_it_was(tmp_path, finished):
    begun = Path(finished.output, "model")
    stage = finished.stages[1].model_copy(update={"grow": {}, "steps": 4})
    run = finished.model_copy(
        update={"model": str(begun), "output": str(tmp_path / "run"), "parameters": "beacons", "stages": (stage,)}
    )
    before, after = read_weights(begun), read_weights(Loop(run).train())
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    idle = {"model.layers.1.self_attn.beacon_q_proj.bias", "model.layers.1.self_attn.beacon_q_proj.weight"}
    assert changed - idle == {name for name in before if BEACON_MARK in name} - idle  # the last layer's ask in vain


def test_the_result_is_served_and_its_memory_refused_by_the_model_it_began_from(tmp_path, finished):
    trained = BeaconModel.from_pretrained(Path(finished.output, "model"))
    untrained = BeaconModel.from_pretrained(Path(finished.output, "stages", "short"))
    memory = trained.compress(range(3, 40), ratio=4)
    assert torch.isfinite(memory.keys).all() and len(memory) == 10
    shape = MemoryShape(layers=trained.layers, kv_heads=trained.kv_heads, head_dim=trained.head_dim, dtype="float32")
    group = SegmentGroup.parse("public/town/1:0-1", len(memory))
    kept = KeptMemory(group, trained.fingerprint, shape, (), (len(memory),))
    expected = Expected(trained.layers, trained.kv_heads, trained.head_dim, untrained.fingerprint)
    loader = MemoryLoader(
        lambda _: kept, untrained.rope, expected, heads=slice(0, 2), block_size=16, dtype=torch.float32
    )
    with pytest.raises(LoadFailed, match=f"encoded by the model {trained.fingerprint[:12]}.*memorize it again"):
        loader.load(SlotRange(group.name, len(memory), 0, len(memory), (0,)), [], torch.device("cpu"))


def test_transformers_reads_the_result(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(finished.output, "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    served = BeaconModel.from_pretrained(folder)
    tokens = tokenizer.encode("Where did Corwin sail to?")
    logits = stock(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits, served.logits(tokens), atol=1e-4, rtol=1e-4)


def test_what_is_trained_on_is_what_is_served_and_the_answer_is_there_to_read(finished):
    from transformers import AutoTokenizer

    from examples.chronicles import training_passages
    from generator_worker.messages import GenerateRequest
    from generator_worker.messages import Source as Passage
    from generator_worker.prompts import build_prompt
    from memory_worker.models.prompts import head_tokens, question_tokens

    tokenizer = AutoTokenizer.from_pretrained(Path(finished.output, "model"))
    arguments = {"facts": [12, 16]}

    def made(name: str, task: str, count: int = 8) -> list[Example]:
        config = DataConfig(
            kind="documents", generator=f"examples.chronicles:{name}", arguments=arguments, tasks={task: 1}
        )
        stage = StageConfig(name="any", data=(config,), steps=1, questions=4)
        return Source(config, tokenizer).examples(random.Random(3), count, stage, 4096)

    examples = made("training_documents", "draft")
    least = min(len(example.text) for example in examples)
    for example in examples:
        assert example.head == head_tokens(tokenizer, "en") and len(example.text) == least
        for ids, prompt in example.tails:
            question = tokenizer.decode(ids[:prompt]).split("Question:\n")[1].split("<|im_end|>")[0]
            assert ids[:prompt] == question_tokens(tokenizer, "draft", question, "en")
            assert tokenizer.decode(ids[prompt:-1]) in f" {tokenizer.decode(example.text)}"

    (example,) = made("training_passages", "draft", count=1)
    (record,) = training_passages(random.Random(3).randrange(2**60), 1, **arguments)
    passages = tuple(Passage(part) for part in re.split(r"\[\d\] ", record["text"]) if part)
    for ids, prompt in example.tails:
        question = tokenizer.decode(ids[:prompt]).split("Question: ")[1].split("<|im_end|>")[0]
        served = build_prompt(tokenizer, GenerateRequest("answer", question, passages, "en", None, ""), 10**5, 10)
        assert [*example.head, *example.text, *ids[:prompt]] == served.token_ids


def test_the_command_line_trains_and_prepares(tmp_path):
    from serving.cli.main import app

    run = tiny_run(tmp_path)
    file = tmp_path / "run.yaml"
    settings = json.loads(run.model_dump_json()) | {
        "output": "here",
        "stages": [json.loads(run.stages[0].model_dump_json())],
    }
    file.write_text(yaml.safe_dump(settings))
    made = CliRunner().invoke(app, ["train", str(file), "--in-process", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["model"] == str(tmp_path / "here" / "model")
    assert "step 8" in made.stderr and "tokens/s" in made.stderr

    other = tmp_path / "other"
    made = CliRunner().invoke(app, ["train", str(file), "--in-process", "--seed", "9", "--output", str(other)])
    assert made.exit_code == 0, made.output
    models = [str(tmp_path / "here" / "model"), str(other / "model")]
    made = CliRunner().invoke(app, ["train", "average", *models, "--out", str(tmp_path / "mean"), "--json"])
    assert made.exit_code == 0, made.output
    one, two, mean = map(read_weights, (*map(Path, models), tmp_path / "mean"))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert all(torch.allclose(mean[name], (one[name] + two[name]) / 2, atol=1e-6) for name in one)
    assert BeaconModel.from_pretrained(tmp_path / "mean").layers  # it is read like any other
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("kept")
    made = CliRunner().invoke(app, ["train", "average", *models, "--out", str(tmp_path / "full")])
    assert made.exit_code == 1 and "exists already" in made.stderr
    assert (tmp_path / "full" / "diary.txt").read_text() == "kept"
    made = CliRunner().invoke(app, ["train", "average", models[0], "--out", str(tmp_path / "one")])
    assert made.exit_code == 1 and "name another" in made.stderr

    (tmp_path / "tale.txt").write_text(
        "Captain Mary Hale sailed the Tern round the cape in 1807.\nShe came home with saffron.\n\n"
        "Nobody in Vey believed her, until the harbour master opened the hold."
    )
    out = tmp_path / "tasks.jsonl"
    made = CliRunner().invoke(app, ["train", "prepare", str(tmp_path / "tale.txt"), "--out", str(out), "--json"])
    assert made.exit_code == 0, made.output
    (document,) = map(json.loads, out.read_text().splitlines())
    assert json.loads(made.stdout)["questions"] == len(document["questions"]) > 1
    stage = run.stages[0].model_copy(
        update={"steps": 2, "data": (run.stages[0].data[0].model_copy(update={"files": (str(out),)}),)}
    )
    Loop(run.model_copy(update={"stages": (stage,), "output": str(tmp_path / "own")})).train()

    file.write_text(file.read_text().replace("learning_rate", "learning_rat"))
    failed = CliRunner().invoke(app, ["train", str(file)])
    assert failed.exit_code == 1 and "did you mean learning_rate?" in failed.stderr


def test_prepared_tasks_are_exact_and_the_same_for_the_same_seed():
    text = (ROOT / "examples" / "chronicle.txt").read_text("utf-8")
    made = prepare(text, id="town", title="town", most=60)
    assert made == prepare(text, id="town", title="town", most=60)
    assert {question["kind"] for question in made["questions"]} == {"cloze", "evidence", "surrogate"}
    for question in made["questions"]:
        ((start, end),) = question["evidence"]
        sentence = " ".join(text[start:end].split())
        assert question["clues"] == [sentence] and question["answers"][0] in sentence
        if question["kind"] == "cloze":
            assert sentence == question["question"].partition(": ")[2].replace("____", question["answers"][0])
        assert (question["kind"] == "surrogate") == ("surrogate" in question)
    assert any(question.get("surrogate", "").startswith("Who became ") for question in made["questions"])
    with pytest.raises(ValueError, match="no sentence"):
        prepare("Oh.", id="oh", title="oh")


def test_the_shipped_runs_are_valid_and_their_phrases_are_the_prompts_own():
    from generator_worker.prompts import _INSTRUCTIONS, _LABELS

    runs = sorted((ROOT / "memory_worker" / "training" / "runs").glob("*.yaml"))
    loaded = [load_run(file) for file in runs]
    fresh = [run for run in loaded if run.model is None]
    adapted = [run for run in loaded if run.parameters == "lora"]
    assert fresh and {run.model for run in adapted} == {"smollm2"}
    assert all(Path(run.model or "").name == "model" for run in loaded if run not in fresh and run not in adapted)
    for run in fresh:
        (phrase,) = run.fresh.tokenizer.phrases
        assert phrase == f"{_INSTRUCTIONS['answer', 'en']}\n\n{_LABELS['en']['passages']}\n\n"


def test_what_cannot_be_trained_is_said(tmp_path, finished):
    with pytest.raises(TrainingError, match="cannot be read as YAML"):
        load_run(tmp_path / "none.yaml")
    data = finished.stages[0].data[0]
    for changed, words in (
        ({"files": ("/nowhere.jsonl",)}, "no file /nowhere.jsonl"),
        ({"generator": "examples.chronicles:training_documents"}, "give one of them"),
        ({"files": (), "generator": "examples.nothing:at_all"}, "module:function"),
    ):
        stage = finished.stages[0].model_copy(update={"data": (data.model_copy(update=changed),)})
        with pytest.raises(TrainingError, match=words):
            Loop(finished.model_copy(update={"stages": (stage,), "output": str(tmp_path / "run")})).train()
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        RunConfig.model_validate({**finished.model_dump(), "optimizer": "muon", "workers": 2})
