"""The beacon model as a component: checkpoints taken and refused, errors, progress, fingerprint, memory use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from memory_worker.models.beacon import (
    BeaconModel,
    Rope,
    Slots,
    UnsupportedCheckpoint,
    UnsupportedRatio,
    UnsupportedRope,
)
from tests.support.beacon_reference import VOCABULARY, Reference, write_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def test_a_ratio_that_does_not_divide_the_window_names_those_that_do(tmp_path) -> None:
    model = BeaconModel.from_pretrained(write_checkpoint(tmp_path, beacon_window=24, beacon_ratio=[3]))
    assert model.ratios_that_divide() == (2, 3, 4, 8)
    with pytest.raises(UnsupportedRatio, match=r"ratio 16 .* 24 tokens; use 2, 3, 4, 8"):
        model.compress(tokens(24), ratio=16)
    with pytest.raises(UnsupportedRatio):
        model.compress_documents([tokens(24)], ratio=0)


@pytest.mark.parametrize("bad", [[], [VOCABULARY], [-1]])
def test_bad_tokens(tmp_path, bad: list[int]) -> None:
    model = BeaconModel.from_pretrained(write_checkpoint(tmp_path, beacon_window=32))
    with pytest.raises(ValueError, match="token"):
        model.compress(bad, ratio=4)
    with pytest.raises(ValueError, match="token"):
        list(model.compress_documents([[1, 2], bad], ratio=4))


def test_a_memory_of_another_model_is_refused(tmp_path) -> None:
    model = BeaconModel.from_pretrained(write_checkpoint(tmp_path, beacon_window=32))
    wrong = Slots(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    with pytest.raises(ValueError, match="another model"):
        model.logits([1], wrong)


def test_without_beacon_weights_it_reads_and_compresses_nothing(tmp_path) -> None:
    folder = write_checkpoint(tmp_path / "stock", beacons=False)
    model = BeaconModel.from_pretrained(folder)
    assert not model.has_beacons and model.window == 2048
    text = tokens(100)
    keys, values = Reference(folder).compress(text, ratio=1, window=2048, head=len(text))
    (group,) = model.compress_documents([text], ratio=None)
    torch.testing.assert_close(group[0].slots.keys, keys, rtol=0, atol=1e-4)
    torch.testing.assert_close(group[0].slots.values, values, rtol=0, atol=1e-4)
    with pytest.raises(UnsupportedCheckpoint, match="has no beacon weights"):
        model.compress(text, ratio=4)


@pytest.mark.parametrize("group_windows", [1, 3])
def test_what_is_not_compressed_is_the_same_in_however_many_windows(tmp_path, group_windows: int) -> None:
    folder = write_checkpoint(tmp_path, beacon_window=32)
    model = BeaconModel.from_pretrained(folder)
    texts = [tokens(100), tokens(7, seed=1), tokens(64, seed=2)]
    head = model.compress(tokens(5, seed=3), ratio=1, head=5)
    parts: dict[int, list[Slots]] = {number: [] for number in range(3)}
    for group in model.compress_documents(texts, ratio=None, memory=head, group_windows=group_windows):
        for part in group:
            parts[part.document].append(part.slots)
    for number, text in enumerate(texts):
        keys, values = Reference(folder).compress(
            text, ratio=1, window=32, head=len(text), memory=(head.keys, head.values)
        )
        made = Slots.concat(parts[number])
        torch.testing.assert_close(made.keys, keys[:, :, 5:], rtol=0, atol=1e-4)
        torch.testing.assert_close(made.values, values[:, :, 5:], rtol=0, atol=1e-4)


def test_prompts_that_go_on_together_go_on_as_each_alone(tmp_path) -> None:
    model = BeaconModel.from_pretrained(write_checkpoint(tmp_path, beacon_window=32))
    prompts = [tokens(count, seed=count) for count in (3, 70, 32)]
    head = model.compress(tokens(5), ratio=1, head=5)
    alone = [model.generate(prompt, head, max_new_tokens=12) for prompt in prompts]
    assert model.generate_each(prompts, head, max_new_tokens=12) == alone
    stop = {alone[0][4], alone[1][2]}
    ended = [next((i for i, token in enumerate(each) if token in stop), 12) for each in alone]
    until = [each[:end] for each, end in zip(alone, ended, strict=True)]
    assert model.generate_each(prompts, head, max_new_tokens=12, stop=stop) == until
    assert model.generate_each([], max_new_tokens=3) == []


def test_qwen3_reads_as_transformers_does(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, use_cache=True,
    )  # fmt: skip
    stock = Qwen3ForCausalLM(config)
    for layer in stock.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(layer.self_attn.k_norm.weight, 1.0, 0.3)
    stock.save_pretrained(tmp_path)
    text = tokens(60)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(text[None]).logits[0]
    torch.testing.assert_close(BeaconModel.from_pretrained(tmp_path).logits(text), expected, rtol=0, atol=1e-4)


def test_sharded_and_single_files_are_the_same_model(tmp_path) -> None:
    single = BeaconModel.from_pretrained(write_checkpoint(tmp_path / "single", beacon_window=32))
    sharded = BeaconModel.from_pretrained(write_checkpoint(tmp_path / "sharded", beacon_window=32, shards=3))
    text = tokens(100)
    assert torch.equal(single.compress(text, ratio=4).keys, sharded.compress(text, ratio=4).keys)
    assert single.fingerprint == sharded.fingerprint


def test_the_fingerprint_changes_with_any_weight_and_with_the_recipe(tmp_path) -> None:
    folder = write_checkpoint(tmp_path / "a", beacon_window=32)
    seen = {BeaconModel.from_pretrained(folder).fingerprint}
    weights = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.self_attn.beacon_k_proj.bias", "model.beacon_embed_tokens.weight", "lm_head.weight"):
        changed = {key: tensor.clone() for key, tensor in weights.items()}
        changed[name].view(-1)[0] += 1e-3
        save_file(changed, folder / "model.safetensors")
        seen.add(BeaconModel.from_pretrained(folder).fingerprint)
    for number, config in enumerate(({"beacon_window": 64}, {"beacon_window": 32, "rope_theta": 5e5})):
        seen.add(BeaconModel.from_pretrained(write_checkpoint(tmp_path / str(number), **config)).fingerprint)
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "gpt2"}, UnsupportedCheckpoint),
        ({"model_type": "mistral", "sliding_window": 4096}, UnsupportedCheckpoint),
        ({"hidden_act": "gelu"}, UnsupportedCheckpoint),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedRope),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, UnsupportedRope),
    ],
)
def test_checkpoints_that_cannot_be_run_are_refused(tmp_path, config: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        BeaconModel.from_pretrained(write_checkpoint(tmp_path, **config))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen2-beacon", "Qwen2ForCausalLM"])
def test_published_model_types_are_known(tmp_path, model_type: str) -> None:
    options = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "beacon_window": 32, "beacon_ratio": [4, 8]}
    folder = write_checkpoint(tmp_path, model_type=model_type, **options)
    assert len(BeaconModel.from_pretrained(folder).compress(tokens(64), ratio=8)) == 8


def test_a_missing_weight_or_file_is_named(tmp_path) -> None:
    folder = write_checkpoint(tmp_path, beacon_window=32)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        BeaconModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"lacks model\.safetensors"):
        BeaconModel.from_pretrained(folder)


def test_progress_after_each_group(tmp_path) -> None:
    model = BeaconModel.from_pretrained(write_checkpoint(tmp_path, beacon_window=32))
    seen: list[tuple[int, Slots]] = []
    text = tokens(5 + 32 * 4 + 6)
    memory = model.compress(
        text, ratio=4, head=5, group_windows=2, on_group=lambda done, slots: seen.append((done, slots))
    )
    done = [tokens for tokens, _ in seen]
    assert done == sorted(set(done)) and len(done) >= 3 and done[-1] == len(text)
    assert torch.equal(Slots.concat([slots for _, slots in seen]).keys, memory.keys)
    assert torch.equal(Slots.concat([slots for _, slots in seen]).values, memory.values)


def test_rope_reads_old_and_new_configs(tmp_path) -> None:
    base = {"hidden_size": 64, "num_attention_heads": 4}
    old = Rope.from_config({**base, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    new = Rope.from_config({**base, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}})
    assert torch.equal(old.frequencies, new.frequencies) and old.scale == new.scale == 1.0
    keys = torch.randn(2, 3, 7, 16)
    assert torch.equal(old.rotate(keys, torch.zeros(7, dtype=torch.int64)), keys)
    half = old.rotate(keys.bfloat16(), torch.arange(7))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), old.rotate(keys, torch.arange(7)), rtol=0.02, atol=0.02)


class _Largest(TorchDispatchMode):
    """Remembers the elements of the largest storage that any operation made, those of `kept` shapes aside."""

    def __init__(self, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.kept, self.elements = kept, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                if size != torch.Size(self.kept).numel():
                    self.elements = max(self.elements, size)
        return result


def test_only_the_slots_grow_with_the_text(tmp_path: Path) -> None:
    """No operation makes a tensor beyond slots and a bound set by the group: no mask, no copy of the slots."""
    window, ratio, group = 64, 4, 2
    model = BeaconModel.from_pretrained(write_checkpoint(tmp_path, beacon_window=window))
    largest = []
    for windows in (10, 160):
        text = tokens(window * windows)
        kept = (model.layers, model.kv_heads, len(text) // ratio, model.head_dim)
        with _Largest(kept) as watch:
            slots = model.compress(text, ratio=ratio, group_windows=group)
        assert slots.keys.shape == kept
        largest.append(watch.elements)
    rows = group * (window + window // ratio)
    one_layer = kept[1] * kept[2] * kept[3]
    assert largest[1] == largest[0] <= rows * 2 * 96 < one_layer
