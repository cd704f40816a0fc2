"""The contract of memory kinds: whatever the kind, a memory is made, stored, resumed, mended and asked alike."""

import asyncio
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import DynamicCache

from benchmarks.support.recall_engine import Reference
from cluster.config import EngineConfig
from cluster.planning.costs import GIST_WINDOW, MemoryKind
from cluster.storage.durable import DamagedFile
from memory_worker.config import MemorizeConfig, MemoryConfig
from memory_worker.errors import UnfitRatio, UnsupportedKind
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.messages import MemorizeProgress, MemorizeRequest, MemorizeResult
from memory_worker.models.beacon import BeaconModel, Slots
from memory_worker.models.fingerprint import KINDS, fingerprint_of
from memory_worker.models.prompts import gist_frame
from memory_worker.storage.store import MemoryStore, checkpoint_path
from tests.support.kinds_of_memory import NOTE, RATIOS, STORY, config_for, request_for, stock_model
from tests.support.memorizing import files_of, steps_until

TEXTS = {"story": STORY, "note": NOTE, "dot": "."}
LONG_WINDOWS = ("gist", "pruned")
kinds = pytest.mark.parametrize("kind", get_args(MemoryKind))


@pytest.fixture(scope="module")
def model(random_model: Path) -> Path:
    return random_model


@pytest.fixture(scope="module")
def stock(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_model(random_model, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    return MemoryStore(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture(scope="module")
def memorizer(model: Path, store: MemoryStore) -> Memorizer:
    return Memorizer(config_for(model, group_windows=1), store.storage.root)


class Made:
    """A memory of each kind, made once for all tests."""

    def __init__(self, memorizer: Memorizer, store: MemoryStore) -> None:
        self._memorizer, self._store = memorizer, store
        self._made: dict[str, tuple[MemorizeRequest, list[MemorizeProgress], MemorizeResult]] = {}

    async def of(self, kind: MemoryKind) -> tuple[MemorizeRequest, list[MemorizeProgress], MemorizeResult]:
        if kind not in self._made:
            request = request_for(self._store, f"made-{kind}", kind, TEXTS)
            *progress, result = await steps_until(self._memorizer, request)
            assert isinstance(result, MemorizeResult) and all(isinstance(step, MemorizeProgress) for step in progress)
            self._made[kind] = request, progress, result
        return self._made[kind]


@pytest.fixture(scope="module")
def made(memorizer: Memorizer, store: MemoryStore) -> Made:
    return Made(memorizer, store)


@kinds
async def test_a_text_becomes_segments_of_its_kind(
    memorizer: Memorizer, store: MemoryStore, made: Made, kind: MemoryKind
) -> None:
    request, progress, result = await made.of(kind)
    described = (await memorizer.describe()).kinds[kind]
    assert result.fingerprint == fingerprint_of(kind, memorizer._description.fingerprint)
    counts = {name: len(memorizer._encode(text)) for name, text in TEXTS.items()}
    for count, segments in zip(counts.values(), result.segments, strict=True):
        assert sum(segment.tokens for segment in segments) == count
        assert all(segment.tokens % described.window == 0 for segment in segments[:-1])
        for segment in segments:
            files = [store.read_segment(file) for file in segment.files]
            assert {file.shape for file in files} == {result.shape}
            assert segment.slots == sum(file.slots for file in files)
            if kind == "gist":
                windows = -(-segment.tokens // GIST_WINDOW)
                assert 0 < segment.slots <= windows * GIST_WINDOW // request.ratio
            else:
                assert segment.slots == -(-segment.tokens // request.ratio)
    assert len(result.segments[0]) > 1
    assert [step.done_tokens for step in progress] == sorted({step.done_tokens for step in progress})
    assert progress[0].done_tokens == 0 and progress[-1].done_tokens == sum(counts.values())


async def test_what_was_dropped_is_said_of_pruned_segments_alone(made: Made) -> None:
    for kind in KINDS:
        request, _, result = await made.of(kind)
        dropped = [segment.dropped for segments in result.segments for segment in segments]
        if kind == "pruned":
            assert all(0 < share < 1 - 1 / request.ratio for share in dropped[:-1])
        else:
            assert not any(dropped)


async def test_all_kinds_begin_with_the_same_head(made: Made) -> None:
    results = [(await made.of(kind))[2] for kind in KINDS]
    assert len({result.head.digest for result in results}) == 1
    assert len({result.fingerprint for result in results}) == len(KINDS)


@pytest.mark.long  # the short form gives up within a segment, below
@pytest.mark.parametrize(("kind", "every"), [*((kind, 4) for kind in get_args(MemoryKind)), ("gist", 1)])
async def test_a_job_that_is_given_up_after_any_group_goes_on_to_the_same_files(
    memorizer: Memorizer, store: MemoryStore, made: Made, kind: MemoryKind, every: int
) -> None:
    whole, progress, result = await made.of(kind)
    resumed = set()
    for stop in range(1, len(progress) + 1) if every == 1 else (1, len(progress) // 2, len(progress) - 1):
        request = request_for(store, f"resumed-{kind}", kind, TEXTS)
        await steps_until(memorizer, request, stop)
        first, *_, end = await steps_until(memorizer, request)
        assert isinstance(first, MemorizeProgress)
        resumed.add(first.done_tokens)
        assert files_of(end, request.key) == files_of(result, whole.key)
    assert len(resumed) > 2


@pytest.mark.parametrize(
    "kind", [kind if kind in LONG_WINDOWS else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)  # beacons, which the full kind is read like, go on in test_checkpoint.py
async def test_a_job_goes_on_within_a_segment(model: Path, store: MemoryStore, kind: MemoryKind) -> None:
    memorizer = Memorizer(config_for(model, group_windows=1, segment_tokens=8192), store.storage.root)
    whole, request = (request_for(store, f"within-{kind}", kind, {"story": STORY}) for _ in range(2))
    *_, result = await steps_until(memorizer, whole)
    assert isinstance(result, MemorizeResult) and len(result.segments[0]) == 1
    await steps_until(memorizer, request, 2 if kind in LONG_WINDOWS else 9)
    first, *_, end = await steps_until(memorizer, request)
    assert isinstance(first, MemorizeProgress) and 0 < first.done_tokens < first.total_tokens
    assert files_of(end, request.key) == files_of(result, whole.key)


async def test_heads_that_share_their_slots_are_resumed_and_made_again_the_same(
    model: Path, store: MemoryStore
) -> None:
    config = config_for(model, group_windows=1, segment_tokens=8192, head_budgets=True)
    memorizer = Memorizer(config, store.storage.root)
    together = memorizer._encoders["pruned"].together
    assert together == memorizer._model.kv_heads > 1
    whole, request = (request_for(store, "budgets", "pruned", {"story": STORY, "dot": "."}) for _ in range(2))
    *_, result = await steps_until(memorizer, whole)
    assert isinstance(result, MemorizeResult)
    (story,), (dot,) = result.segments
    assert story.head_budgets and not dot.head_budgets and 0 < story.dropped < 1 - 1 / RATIOS["pruned"]
    counts = [store.read_segment(file).counts for file in story.files]
    assert len(counts) > 1 and all(one is not None and one.shape[2] == together for one in counts)
    assert any(len({*one.ravel().tolist()}) > 1 for one in counts if one is not None)
    await steps_until(memorizer, request, 2)
    alike = Memorizer(config_for(model, group_windows=1, segment_tokens=8192), store.storage.root)
    first, *_ = await steps_until(alike, request, 1)
    assert isinstance(first, MemorizeProgress) and first.done_tokens == 0, "it was begun for another engine"
    first, *_, end = await steps_until(memorizer, request)
    assert isinstance(first, MemorizeProgress) and 0 < first.done_tokens < first.total_tokens
    assert files_of(end, request.key) == files_of(result, whole.key)


@pytest.mark.parametrize(
    ("engine", "memorize", "together"),
    [
        ({}, {}, 1),
        ({}, {"head_budgets": True}, 6),
        ({"block_size": 16}, {"head_budgets": True}, 6),
        ({"block_size": 128}, {"head_budgets": True}, 1),
        ({"tensor_parallel_size": 2}, {"head_budgets": True}, 3),
        ({"tensor_parallel_size": 4}, {"head_budgets": True}, 1),
    ],
)
def test_heads_share_where_the_engine_can_read_it(
    engine: dict[str, Any], memorize: dict[str, Any], together: int
) -> None:
    config = MemoryConfig(engine=EngineConfig(model="m", **engine), memorize=MemorizeConfig(**memorize))
    assert config.heads_together(6) == together


async def test_gists_are_durable_after_every_group_however_seldom_slots_are(model: Path, store: MemoryStore) -> None:
    config = config_for(model, group_windows=1, segment_tokens=8192, checkpoint_windows=64)
    memorizer = Memorizer(config, store.storage.root)
    request = request_for(store, "durable-gists", "gist", {"story": STORY})
    *_, seen = await steps_until(memorizer, request, 2)
    first, *_ = await steps_until(memorizer, request)
    assert isinstance(first, MemorizeProgress) and isinstance(seen, MemorizeProgress)
    assert first.done_tokens == seen.done_tokens > 0


@kinds
async def test_a_checkpoint_of_another_kind_is_begun_anew(
    memorizer: Memorizer, store: MemoryStore, kind: MemoryKind
) -> None:
    other: MemoryKind = "full" if kind != "full" else "beacon"
    request = request_for(store, f"changed-{kind}", kind, {"note": NOTE, "dot": "."})
    await steps_until(memorizer, request, 2)
    assert store.storage.exists(checkpoint_path(request.key))
    changed = MemorizeRequest(request.key, request.documents, RATIOS[other], "en", kind=other)
    first, *_ = await steps_until(memorizer, changed)
    assert isinstance(first, MemorizeProgress) and first.done_tokens == 0


@kinds
def test_a_damaged_file_is_refused_and_made_again_the_same(
    memorizer: Memorizer, store: MemoryStore, kind: MemoryKind
) -> None:
    request = request_for(store, f"damaged-{kind}", kind, {"note": NOTE})
    *_, result = asyncio.run(steps_until(memorizer, request))
    assert isinstance(result, MemorizeResult)
    entry = result.segments[0][0].files[0]
    file = Path(store.storage.root, entry.path)
    good = file.read_bytes()
    file.write_bytes(good[:-9] + b"x" + good[-8:])
    with pytest.raises(DamagedFile, match="does not match its SHA-256"):
        store.read_segment(entry)
    first, *_, again = asyncio.run(steps_until(memorizer, request))  # the checkpoint names what is damaged
    assert isinstance(first, MemorizeProgress) and first.done_tokens == 0
    assert again == result and file.read_bytes() == good


@kinds
async def test_a_ratio_that_the_kind_cannot_have_is_refused(
    memorizer: Memorizer, store: MemoryStore, kind: MemoryKind
) -> None:
    request = request_for(store, f"ratio-{kind}", kind, {"dot": "."})
    bad = MemorizeRequest(request.key, request.documents, 5, "en", kind=kind)
    with pytest.raises(UnfitRatio, match=f"ratio 5 does not fit a {kind} memory"):
        await steps_until(memorizer, bad)


async def test_a_full_memory_is_what_transformers_has_after_reading(
    model: Path, memorizer: Memorizer, store: MemoryStore, made: Made
) -> None:
    _, _, result = await made.of("full")
    reference = Reference(model)
    tokens = memorizer._encode(STORY)
    head = store.read_segment(result.head).tensors()
    start = 0
    for segment in result.segments[0]:
        parts = [head, *(store.read_segment(file).tensors() for file in segment.files)]
        loaded = reference.cache(parts)
        text = [*result.head_tokens, *tokens[start : start + segment.tokens]]
        with torch.no_grad():
            computed = reference.model(torch.tensor([text]), use_cache=True, logits_to_keep=1).past_key_values
        for ours, theirs in zip(loaded.layers, computed.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, atol=2e-4, rtol=1e-4)
        start += segment.tokens


async def test_gists_are_what_transformers_writes_and_their_slots_what_it_has_read(
    model: Path, memorizer: Memorizer, store: MemoryStore, made: Made
) -> None:
    _, _, result = await made.of("gist")
    reference, tokenizer = Reference(model), memorizer._tokenizer
    tokens, end = memorizer._encode(STORY), tokenizer.encode("\n")
    before, after = gist_frame(tokenizer, "en", GIST_WINDOW // RATIOS["gist"])
    head = store.read_segment(result.head).tensors()
    beacon = BeaconModel.from_pretrained(model)
    for number, segment in enumerate(result.segments[0]):  # a window each
        text = [*before, *tokens[number * GIST_WINDOW : (number + 1) * GIST_WINDOW], *after]
        most = GIST_WINDOW // RATIOS["gist"] - len(end)
        gist = reference.continued(DynamicCache(), text, most, end=tokenizer.eos_token_id)
        gist = [*(token for token in gist if token not in tokenizer.all_special_ids), *end]
        (read,) = beacon.compress_documents([gist], ratio=None, memory=Slots(*head))
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*map(_tensors(store), segment.files), strict=True))
        torch.testing.assert_close(keys, read[0].slots.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, read[0].slots.values, atol=1e-4, rtol=1e-4)
    (dot,) = result.segments[2]
    assert dot.slots == dot.tokens, "what is no longer than a gist stays as it is"


def _tensors(store: MemoryStore) -> Any:
    return lambda file: store.read_segment(file).tensors()


async def test_a_model_without_beacon_weights_prunes_unless_told_otherwise(stock: Path, store: MemoryStore) -> None:
    memorizer = Memorizer(config_for(stock), store.storage.root)
    described = await memorizer.describe()
    assert described.kind == "pruned" and set(described.kinds) == {"full", "gist", "pruned"}
    assert described.choose_kind(None, None, 4) == ("pruned", 4)
    assert described.choose_kind("full", None, 4) == ("full", 1)
    with pytest.raises(UnsupportedKind, match="which has no beacon weights: use one of full, gist, pruned"):
        described.choose_kind("beacon", None, 4)
    request = request_for(store, "impossible", "beacon", {"dot": "."})
    with pytest.raises(UnsupportedKind):
        await steps_until(memorizer, request)
    with pytest.raises(UnsupportedKind, match="no memory of kind beacon can be made"):
        Memorizer(config_for(stock, kind="beacon"), store.storage.root)


async def test_a_model_with_beacon_weights_makes_beacons_unless_told_otherwise(
    model: Path, memorizer: Memorizer, store: MemoryStore
) -> None:
    described = await memorizer.describe()
    assert described.kind == "beacon" and set(described.kinds) == set(KINDS)
    full = await Memorizer(config_for(model, kind="full"), store.storage.root).describe()
    assert full.choose_kind(None, None, 4) == ("full", 1)


@pytest.fixture(scope="module")
def seen(seen_by_engines: dict[str, Any]) -> dict[str, Any]:
    return seen_by_engines["kinds"]


@kinds
def test_what_is_loaded_is_what_was_stored(seen: dict[str, Any], kind: MemoryKind) -> None:
    assert seen[kind]["loaded"]


@kinds
def test_the_engine_answers_as_transformers_over_the_same_memory(seen: dict[str, Any], kind: MemoryKind) -> None:
    groups = seen[kind]["groups"]
    assert groups["note"] == groups["twin"] == 1
    assert groups["story"] == (4 if kind == "full" else 1), "what one prompt cannot hold is asked in groups"
    assert seen[kind]["right"] == sum(groups.values())


@kinds
def test_memories_do_not_answer_for_each_other(seen: dict[str, Any], kind: MemoryKind) -> None:
    assert seen[kind]["different"] == sum(seen[kind]["groups"].values()) and seen[kind]["again"]


@kinds
def test_a_memory_of_another_model_is_refused(seen: dict[str, Any], kind: MemoryKind) -> None:
    assert seen[kind]["other_model"] == ["error"]


def test_a_full_memory_is_answered_as_the_text_itself(seen: dict[str, Any]) -> None:
    assert seen["full"]["plain"]


def test_memories_of_different_kinds_are_asked_at_once_apart_from_each_other(seen: dict[str, Any]) -> None:
    assert seen["together"] == {"groups": len(KINDS), "right": True}
