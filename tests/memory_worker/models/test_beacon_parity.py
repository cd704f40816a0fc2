"""The beacon model makes the memories of the recipe: golden tensors, and a plain reference on random checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memory_worker.models.beacon import BeaconModel, Rope, Slots
from tests.support.beacon_reference import VOCABULARY, Reference, write_checkpoint

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens"
TOLERANCE = 1e-4
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden_cases() -> list[tuple[str, str]]:
    folders = sorted(GOLDENS.iterdir()) if GOLDENS.is_dir() else []
    return [(f.name, case["name"]) for f in folders for case in json.loads((f / "cases.json").read_text())["cases"]]


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def assert_same(slots: Slots, keys: torch.Tensor, values: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert slots.keys.shape == keys.shape and slots.values.shape == values.shape
    torch.testing.assert_close(slots.keys, keys, rtol=0, atol=tolerance)
    torch.testing.assert_close(slots.values, values, rtol=0, atol=tolerance)


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="the reference tensors, shared/goldens, are not beside the checkout")
@pytest.mark.parametrize("group_windows", [1, 2, 100])
@pytest.mark.parametrize(("folder", "name"), golden_cases())
def test_goldens(folder: str, name: str, group_windows: int) -> None:
    facts = json.loads((GOLDENS / folder / "cases.json").read_text())
    case = next(case for case in facts["cases"] if case["name"] == name)
    expected = load_file(GOLDENS / folder / "expected.safetensors")
    model = BeaconModel.from_pretrained(GOLDENS / folder / "model")
    context = expected[f"{name}.context"]
    memory = model.compress(context, ratio=facts["ratio"], head=case["head"], group_windows=group_windows)
    assert len(memory) == case["memory_tokens"]
    assert_same(memory, expected[f"{name}.keys"], expected[f"{name}.values"])
    if case["question"]:
        question = expected[f"{name}.question"]
        logits = model.logits(question, memory)
        torch.testing.assert_close(logits, expected[f"{name}.logits"], rtol=0, atol=TOLERANCE)
        greedy = expected[f"{name}.greedy"].tolist()
        assert model.generate(question, memory, max_new_tokens=len(greedy)) == greedy


@pytest.mark.parametrize(
    ("options", "window", "ratio", "head", "count"),
    [
        ({}, 32, 8, 0, 32 * 5),
        ({"bias": False, "model_type": "mistral", "sliding_window": None}, 32, 2, 5, 32 * 3 + 10),
        ({"bias": False, "model_type": "llama", "kv_heads": 1, "tied": True}, 24, 4, 7, 24 * 4 + 8),
        ({"kv_heads": 4, "head_dim": 32, "layers": 3}, 64, 32, 0, 64 * 2 + 33),
        ({"model_type": "llama", "bias": False, "rope_scaling": SCALINGS["llama3"]}, 32, 16, 3, 32 * 6 + 1),
        ({"rope_scaling": SCALINGS["yarn"]}, 32, 4, 3, 32 * 6 + 5),
        ({"rope_scaling": SCALINGS["linear"]}, 32, 4, 40, 32 * 3 + 31),
    ],
    ids=["plain", "mistral", "llama", "wide-groups-of-one", "llama3", "yarn", "linear-head-over-window"],
)
@pytest.mark.parametrize("group_windows", [1, 3, 50])
def test_equals_reference(tmp_path, options, window, ratio, head, count, group_windows) -> None:
    folder = write_checkpoint(tmp_path, beacon_window=window, **options)
    model, reference = BeaconModel.from_pretrained(folder), Reference(folder)
    text = tokens(head + count)
    memory = model.compress(text, ratio=ratio, head=head, group_windows=group_windows)
    keys, values = reference.compress(text, ratio=ratio, window=window, head=head)
    assert len(memory) == head + count // window * (window // ratio) + -(-(count % window) // ratio)
    assert_same(memory, keys, values)
    question = tokens(window + 9, seed=1)
    expected = reference.logits(question, (keys, values))
    torch.testing.assert_close(model.logits(question, memory), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.logits(question), reference.logits(question, None), rtol=0, atol=TOLERANCE)


def test_continuing_from_a_memory(tmp_path) -> None:
    folder = write_checkpoint(tmp_path, beacon_window=32)
    model, reference = BeaconModel.from_pretrained(folder), Reference(folder)
    first, second = tokens(32 * 2 + 5), tokens(32 * 3 + 9, seed=1)
    start = model.compress(first, ratio=4, head=5)
    more = model.compress(second, ratio=4, head=3, memory=start)
    expected = reference.compress(first, ratio=4, window=32, head=5)
    expected = reference.compress(second, ratio=4, window=32, head=3, memory=expected)
    assert_same(Slots.concat([start, more]), *expected)


def test_several_documents_in_one_pass_equal_each_alone(tmp_path) -> None:
    folder = write_checkpoint(tmp_path, beacon_window=32)
    model, reference = BeaconModel.from_pretrained(folder), Reference(folder)
    head = tokens(6, seed=9)
    memory = model.compress(head, ratio=8, head=len(head))
    documents = [tokens(count, seed=count) for count in (32 * 4 + 3, 7, 32, 1, 32 * 3)]
    found: dict[int, list[Slots]] = {}
    finished, shared = [], 0
    for parts in model.compress_documents(documents, ratio=8, memory=memory, group_windows=3):
        shared = max(shared, len(parts))
        for part in parts:
            found.setdefault(part.document, []).append(part.slots)
            finished += [part.document] if part.last else []
    assert shared > 1 and finished == [0, 1, 2, 3, 4]
    for number, document in enumerate(documents):
        keys, values = reference.compress(torch.cat([head, document]), ratio=8, window=32, head=len(head))
        assert_same(Slots.concat([memory, *found[number]]), keys, values)


def test_a_resumed_document_is_bit_identical(tmp_path) -> None:
    model = BeaconModel.from_pretrained(write_checkpoint(tmp_path, beacon_window=32), dtype="bfloat16")
    text = tokens(32 * 9 + 4)
    whole, done = [], []
    head = model.compress(text[:5], ratio=4, head=5)
    for (part,) in model.compress_documents([text], ratio=4, memory=head, group_windows=2):
        whole.append(part.slots)
        done.append(part.tokens)
    for stored in range(1, len(whole)):
        before = Slots.concat([head, *whole[:stored]])
        rest = model.compress_documents([text[sum(done[:stored]) :]], ratio=4, memory=before, group_windows=2)
        resumed = Slots.concat([part.slots for (part,) in rest])
        expected = Slots.concat(whole[stored:])
        assert torch.equal(resumed.keys, expected.keys) and torch.equal(resumed.values, expected.values)


@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=str)
def test_rotated_memory_is_a_stock_key_value_prefix(tmp_path, scaling) -> None:
    """What the connector does: rotated to slots 0 … M-1, transformers' own model reads on from the memory."""
    from transformers import AutoModelForCausalLM, DynamicCache

    config = {"rope_scaling": SCALINGS[scaling]} if scaling else {}
    folder = write_checkpoint(tmp_path, beacon_window=32, model_type="llama", bias=False, **config)
    model = BeaconModel.from_pretrained(folder)
    memory = model.compress(tokens(100), ratio=4, head=3)
    question = tokens(11, seed=1)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rope, cache = Rope.from_config(folder), DynamicCache()
    for layer in range(model.layers):
        keys = rope.rotate(memory.keys[layer], torch.arange(len(memory)))
        cache.update(keys[None], memory.values[layer][None], layer)
    with torch.no_grad():
        expected = stock(question[None], past_key_values=cache).logits[0]
    torch.testing.assert_close(model.logits(question, memory), expected, rtol=0, atol=TOLERANCE)


def test_bfloat16_is_close_to_float32(tmp_path) -> None:
    folder = write_checkpoint(tmp_path, beacon_window=64, dtype=torch.bfloat16)
    exact = BeaconModel.from_pretrained(folder).compress(tokens(64 * 8), ratio=8)
    half = BeaconModel.from_pretrained(folder, dtype="bfloat16").compress(tokens(64 * 8), ratio=8)
    assert half.keys.dtype == half.values.dtype == torch.bfloat16
    for found, expected in ((half.keys, exact.keys), (half.values, exact.values)):
        error = (found.float() - expected).norm() / expected.norm()
        assert error < 0.05
