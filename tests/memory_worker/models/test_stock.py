"""Models that transformers reads: slots are its keys and values, unturned; whatever is otherwise is refused at load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from benchmarks.support.recall_engine import Reference
from memory_worker.errors import UnsupportedKind
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.memorize.ranks import load_model
from memory_worker.messages import MemorizeProgress, MemorizeResult
from memory_worker.models.beacon import Part, Slots, UnsupportedCheckpoint, UnsupportedRope, rope
from memory_worker.models.fingerprint import fingerprint_of
from memory_worker.models.stock import StockModel
from memory_worker.storage.store import MemoryStore
from tests.support.kinds_of_memory import NOTE, STORY, config_for, request_for
from tests.support.memorizing import files_of, steps_until
from tests.support.stock_models import MADE, REFUSED, write_model

WINDOW = 32
HEAD, DOCUMENTS = 7, (WINDOW * 3 + 5, 4, WINDOW * 2)  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tokenizer(random_model: Path) -> Path:
    return random_model


@pytest.fixture(scope="module")
def glm(folder: Path, tokenizer: Path) -> Path:
    return write_model(folder / "glm", "glm", tokenizer)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StockModel, "window", WINDOW)


def texts() -> tuple[list[int], list[list[int]]]:
    """A head, and documents."""
    numbers = torch.randint(3, 4096, (HEAD + sum(DOCUMENTS),), generator=torch.Generator().manual_seed(3))
    head, *documents = numbers.split([HEAD, *DOCUMENTS])
    return head.tolist(), [document.tolist() for document in documents]


def slots_of(parts: Any, documents: int) -> list[Slots]:
    """Of each document, from the groups that `compress_documents` yields."""
    found: list[list[Part]] = [[] for _ in range(documents)]
    for group in parts:
        for part in group:
            found[part.document].append(part)
    assert all(parts[-1].last and not any(part.last for part in parts[:-1]) for parts in found)
    return [Slots.concat([part.slots for part in parts]) for parts in found]


@pytest.mark.parametrize("family", MADE)
def test_slots_are_what_transformers_has_after_reading(
    tmp_path: Path, tokenizer: Path, small_windows: None, family: str
) -> None:
    path = write_model(tmp_path, family, tokenizer)
    model, reference = StockModel.from_pretrained(path), Reference(path)
    head, documents = texts()
    (head_slots,) = slots_of(model.compress_documents([head], ratio=None), 1)
    made = slots_of(model.compress_documents(documents, ratio=None, memory=head_slots), len(documents))
    for tokens, slots in zip(documents, made, strict=True):
        assert len(slots) == len(tokens)
        loaded = reference.cache([(head_slots.keys, head_slots.values), (slots.keys, slots.values)])
        with torch.no_grad():
            read = reference.model(torch.tensor([[*head, *tokens]]), use_cache=True).past_key_values
        for ours, theirs in zip(loaded.layers, read.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(ours.values, theirs.values, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_and_interruptions_change_no_byte(glm: Path, small_windows: None, dtype: torch.dtype) -> None:
    model = StockModel.from_pretrained(glm, dtype=dtype)
    head, documents = texts()
    (before,) = slots_of(model.compress_documents([head], ratio=None), 1)
    whole = slots_of(model.compress_documents(documents, ratio=None, memory=before, group_windows=1), len(documents))
    for group_windows in (2, 3, 100):
        again = model.compress_documents(documents, ratio=None, memory=before, group_windows=group_windows)
        for one, other in zip(whole, slots_of(again, len(documents)), strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    for done in (WINDOW, WINDOW * 2):
        had = Slots(whole[0].keys[:, :, :done], whole[0].values[:, :, :done])
        rest = model.compress_documents([documents[0][done:]], ratio=None, memory=[Slots.concat([before, had])])
        (slots,) = slots_of(rest, 1)
        assert torch.equal(slots.keys, whole[0].keys[:, :, done:])
        assert torch.equal(slots.values, whole[0].values[:, :, done:])


def test_prompts_of_all_lengths_are_written_on_together_as_alone(glm: Path) -> None:
    model, reference = StockModel.from_pretrained(glm), Reference(glm)
    _, prompts = texts()
    alone = [reference.continued(DynamicCache(), prompt, 20) for prompt in prompts]
    assert model.generate_each(prompts, max_new_tokens=20) == alone
    stop = {alone[0][5], alone[2][9]}
    until = [[*row[: next((i for i, token in enumerate(row) if token in stop), 20)]] for row in alone]
    assert model.generate_each(prompts, max_new_tokens=20, stop=stop) == until
    assert model.generate_each([], max_new_tokens=20) == []


def test_the_fingerprint_is_of_weights_and_of_what_decides_in_the_config(tmp_path: Path, tokenizer: Path) -> None:
    def fingerprint() -> str:
        return StockModel.from_pretrained(tmp_path).fingerprint

    write_model(tmp_path, "granite", tokenizer)
    first, config = fingerprint(), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "1"}))
    assert fingerprint() == first
    (tmp_path / "config.json").write_text(json.dumps(config | {"residual_multiplier": 0.9}))
    assert fingerprint() != first
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint() != first


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_make_memories_is_refused(tmp_path: Path, tokenizer: Path, family: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=f"{family}' that cannot make memories: .*; use a decoder"):
        StockModel.from_pretrained(write_model(tmp_path, family, tokenizer))


@pytest.mark.parametrize(
    ("family", "changes", "error"),
    [
        ("phi3", {"sliding_window": 2048}, UnsupportedCheckpoint),
        ("starcoder2", {"sliding_window": 2048}, UnsupportedCheckpoint),
        ("glm", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, UnsupportedRope),
    ],
)
def test_settings_under_which_memories_are_lost_are_refused(
    tmp_path: Path, tokenizer: Path, family: str, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        StockModel.from_pretrained(write_model(tmp_path, family, tokenizer, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["glm", "cohere", "smollm3"])
def test_a_family_that_rotates_in_a_way_not_known_here_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    write_model(tmp_path, family, tokenizer)
    monkeypatch.setattr(rope, "INTERLEAVED", ("smollm3",))
    with pytest.raises(UnsupportedCheckpoint, match="depend on positions in another way"):
        StockModel.from_pretrained(tmp_path, dtype=dtype)


def test_what_a_checkpoint_lacks_is_not_made_up_and_its_code_is_not_run(tmp_path: Path, glm: Path) -> None:
    for file in glm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedCheckpoint, match=r"lacks the weight model\.layers\.1\.mlp\.down_proj\.weight"):
        StockModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpoint, match="does not load it"):
        StockModel.from_pretrained(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "configuration_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match="without running code of its own"):
        StockModel.from_pretrained(tmp_path)
    assert not marker.exists()


def test_beacons_and_ranks_are_not_for_such_a_model(glm: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="no beacon weights"):
        next(StockModel.from_pretrained(glm).compress_documents([[1]], ratio=4))
    with pytest.raises(UnsupportedCheckpoint, match=r"set memory\.memorize\.ranks to 1"):
        load_model(config_for(glm, ranks=2))


async def test_a_memorizer_makes_memories_without_beacons_and_goes_on_to_the_same_files(
    glm: Path, tmp_path: Path
) -> None:
    store = MemoryStore(str(tmp_path))
    memorizer = Memorizer(config_for(glm, group_windows=1), store.storage.root)
    described = await memorizer.describe()
    assert described.kind == "pruned" and set(described.kinds) == {"full", "gist", "pruned"}
    with pytest.raises(UnsupportedKind):
        described.choose_kind("beacon", None, 4)
    for kind in described.kinds:
        whole, request = (request_for(store, kind, kind, {"story": STORY, "note": NOTE}) for _ in range(2))
        *_, result = await steps_until(memorizer, whole)
        assert isinstance(result, MemorizeResult)
        assert result.fingerprint == fingerprint_of(kind, described.fingerprint)
        await steps_until(memorizer, request, 3)
        first, *_, end = await steps_until(memorizer, request)
        assert isinstance(first, MemorizeProgress) and first.done_tokens > 0
        assert files_of(end, request.key) == files_of(result, whole.key)


@pytest.mark.parametrize(
    ("family", "seen"), [("glm", "seen_by_engines"), pytest.param("phi3", "seen_in_long", marks=pytest.mark.long)]
)  # neighbours, half of each head; halves, as Llama does
def test_the_engine_answers_as_transformers_over_the_text_itself(
    request: pytest.FixtureRequest, family: str, seen: str
) -> None:
    found = request.getfixturevalue(seen)["stock"]
    assert found[family]["plain"], "a full memory is answered as the text"
    for kind in ("full", "gist"):
        of = found[family][kind]
        assert of["loaded"] and of["again"] and of["right"] == of["different"] == 2
