"""`pruned` memories: the scores are KVzip's, the best pairs of each head are kept, and they stand where they stood."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_worker.memorize.kinds.pruned import PrunedEncoder, choose_pairs, prune
from memory_worker.models.beacon import BeaconModel, Repetition, Slots
from memory_worker.models.beacon.attention import most_attention
from memory_worker.models.stock import StockModel
from tests.support.kinds_of_memory import stock_model
from tests.support.masked import MaskedReference
from tests.support.stock_models import MADE, write_model

HEAD, TOKENS, ASKED, NEW_TOKENS = 6, 110, 8, 8
STRETCHES = ((0, 45), (45, 90), (90, TOKENS))


@pytest.fixture(scope="module")
def stock(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As hubs have them, and trained enough for its attention not to be flat."""
    return stock_model(random_model, tmp_path_factory.mktemp("models"))


def numbers(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, 4000, (count,), generator=torch.Generator().manual_seed(seed))


def repetitions_of(text: torch.Tensor) -> list[Repetition]:
    return [Repetition(start, end, torch.cat([numbers(9, start + 1), text[start:end]])) for start, end in STRETCHES]


def read(model: BeaconModel | StockModel, text: torch.Tensor) -> tuple[Slots, Slots, torch.Tensor]:
    ((head,),) = model.compress_documents([numbers(HEAD)], ratio=None)
    return head.slots, *model.read_scored(text, memory=head.slots, repetitions=repetitions_of(text))


def expected_scores(path: Path, text: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """By transformers, from its whole matrices of attention: those to a stretch, shared as KVzip shares them."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    context, scores = torch.cat([numbers(HEAD), text]), []
    for repetition in repetitions_of(text):
        with torch.no_grad():
            both = torch.cat([context, repetition.tokens])[None]
            attentions = model(both, output_attentions=True, logits_to_keep=1).attentions
        seen = torch.zeros(len(both[0]), dtype=torch.bool)
        seen[:4] = seen[HEAD + repetition.start : HEAD + repetition.end] = seen[len(context) :] = True
        rows = torch.stack(attentions)[:, 0, :, len(context) :]  # [layers, heads, rows, all]
        shares = rows / (rows * seen).sum(dim=-1, keepdim=True)
        most = shares[..., HEAD + repetition.start : HEAD + repetition.end].amax(dim=2)
        scores.append(most.unflatten(1, (kv_heads, -1)).amax(dim=2))
    return torch.cat(scores, dim=2)


def test_scores_are_the_most_attention_that_a_repetition_pays(stock: Path) -> None:
    text = numbers(TOKENS, 8)
    models = BeaconModel.from_pretrained(stock), StockModel.from_pretrained(stock)
    expected = expected_scores(stock, text, models[0].kv_heads)
    for model in models:
        _, slots, scores = read(model, text)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-3)
        assert len(slots) == TOKENS
    assert expected.std() > 0.01, "heads that attend to all alike would hide a mistake"


@pytest.mark.parametrize("family", MADE)
def test_any_family_that_can_be_read_can_be_scored(tmp_path: Path, random_model: Path, family: str) -> None:
    path = write_model(tmp_path, family, random_model)
    model = StockModel.from_pretrained(path)
    assert model.can_score
    text = numbers(TOKENS, 9)
    torch.testing.assert_close(read(model, text)[2], expected_scores(path, text, model.kv_heads), atol=2e-5, rtol=2e-3)


def test_attention_is_scored_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.Generator().manual_seed(2)
    queries, first, keys, own = (
        torch.randn(heads, count, 16, generator=made) for heads, count in ((6, 70), (2, 4), (2, 50), (2, 70))
    )
    at_once = most_attention(queries, first, keys, own)
    monkeypatch.setattr("memory_worker.models.beacon.attention._SCORED_ROWS", 9)
    torch.testing.assert_close(most_attention(queries, first, keys, own), at_once)


def test_a_model_whose_attention_cannot_be_seen_is_not_scored(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StockModel.from_pretrained(stock)
    monkeypatch.setattr(model._model.config, "_attn_implementation_internal", "eager")
    assert not model.can_score


@pytest.mark.parametrize("ratio", PrunedEncoder.ratios)
def test_the_best_pairs_of_each_head_are_kept_in_their_order(stock: Path, ratio: int) -> None:
    model = BeaconModel.from_pretrained(stock)
    _, slots, scores = read(model, numbers(TOKENS, 8))
    count = -(-TOKENS // ratio)
    kept, dropped, _ = prune(slots, scores, count, model.rope)
    assert len(kept) == count
    best = scores.topk(count, dim=-1)
    for layer in range(model.layers):
        for head in range(model.kv_heads):
            places = best.indices[layer, head].sort().values
            torch.testing.assert_close(kept.values[layer, head], slots.values[layer, head, places])
    assert dropped == pytest.approx(1 - float(best.values.sum() / scores.sum()), abs=1e-4)
    assert 0 < dropped < 1 - 1 / ratio


def test_of_equal_pairs_the_first_are_kept(stock: Path) -> None:
    model = BeaconModel.from_pretrained(stock)
    _, slots, scores = read(model, numbers(TOKENS, 8))
    kept, dropped, _ = prune(slots, torch.ones_like(scores), TOKENS // 2, model.rope)
    assert torch.equal(kept.values, slots.values[:, :, : TOKENS // 2]) and dropped == pytest.approx(0.5)


def test_nothing_pruned_is_the_full_memory(stock: Path) -> None:
    model = BeaconModel.from_pretrained(stock)
    _, slots, scores = read(model, numbers(TOKENS, 8))
    kept, dropped, _ = prune(slots, scores, TOKENS, model.rope)
    torch.testing.assert_close(kept.keys, slots.keys)
    assert torch.equal(kept.values, slots.values) and dropped == 0


@pytest.mark.parametrize("ratio", [2, 4])
def test_what_is_kept_is_answered_as_transformers_does_with_the_others_masked(stock: Path, ratio: int) -> None:
    """Greedy tokens over the pruned memory, and over the whole text whose other pairs nothing may see."""
    model = BeaconModel.from_pretrained(stock)
    text, asked = numbers(TOKENS, 8), numbers(ASKED, 11)
    head, slots, scores = read(model, text)
    count = -(-TOKENS // ratio)
    kept, _, _ = prune(slots, scores, count, model.rope)
    # The head stands at the positions 0 … HEAD, the text so that its last token is followed by the question.
    places = torch.cat([torch.arange(HEAD), torch.arange(TOKENS) + HEAD + count - TOKENS])
    seen = torch.ones(model.layers, model.kv_heads, HEAD + TOKENS, dtype=torch.bool)
    seen[:, :, HEAD:], _ = choose_pairs(scores, count, 1, 1)
    masked = MaskedReference(stock).continued(
        Slots.concat([head, slots]), places, seen, HEAD + count, asked.tolist(), NEW_TOKENS
    )
    assert model.generate(asked, Slots.concat([head, kept]), max_new_tokens=NEW_TOKENS) == masked


def test_heads_that_share_keep_what_adakv_keeps(stock: Path) -> None:
    """In blocks of one pair, that is exactly the best of a layer's heads together (kvpress' AdaKV)."""
    model = BeaconModel.from_pretrained(stock)
    _, slots, scores = read(model, numbers(TOKENS, 8))
    count = TOKENS // 4
    kept, dropped, counts = prune(slots, scores, count, model.rope, together=model.kv_heads, block=1)
    assert counts is not None and len(kept) == count
    best = scores.flatten(1).topk(count * model.kv_heads, dim=1)
    assert dropped == pytest.approx(1 - float(best.values.sum() / scores.sum()), abs=1e-4)
    for layer in range(model.layers):
        mine = {tuple(value.tolist()) for value in kept.values[layer].flatten(0, 1)}
        assert mine == {tuple(value.tolist()) for value in slots.values[layer].flatten(0, 1)[best.indices[layer]]}
    assert counts.sum() == model.layers * count * model.kv_heads and len(set(counts.ravel().tolist())) > 2
    assert dropped < prune(slots, scores, count, model.rope)[1]


def test_windows_fit_the_engine_and_the_positions_that_the_model_knows(stock: Path) -> None:
    model, tokenizer = BeaconModel.from_pretrained(stock), AutoTokenizer.from_pretrained(stock)
    roomy = PrunedEncoder(model, tokenizer, room=100_000, positions=None)
    assert roomy.window == 3 * model.window
    for room, positions in ((roomy.window // 2, None), (100_000, roomy.window)):
        encoder = PrunedEncoder(model, tokenizer, room=room, positions=positions)
        assert encoder.window < roomy.window and all(encoder.window % ratio == 0 for ratio in encoder.ratios)


@pytest.mark.parametrize(("positions", "together"), [(None, 1), (5000, 1), (None, 2)])
def test_later_windows_are_read_behind_the_slots_that_fit(
    stock: Path, monkeypatch: pytest.MonkeyPatch, positions: int | None, together: int
) -> None:
    """Behind the head alone, where heads share their slots."""
    model, tokenizer = BeaconModel.from_pretrained(stock), AutoTokenizer.from_pretrained(stock)
    encoder = PrunedEncoder(model, tokenizer, room=100_000, positions=positions, together=together)
    seen: list[int] = []
    longest = 0

    def read_scored(_: BeaconModel, tokens: Any, *, memory: Slots, repetitions: Any) -> tuple[Slots, torch.Tensor]:
        nonlocal longest
        seen.append(len(memory))
        assert torch.equal(memory.values[:, :, : len(head.slots)], head.slots.values)
        longest = max(longest, *(len(repetition.tokens) for repetition in repetitions))
        nothing = torch.zeros(model.layers, model.kv_heads, len(tokens), model.head_dim)
        return Slots(nothing, nothing), torch.ones(nothing.shape[:3])

    monkeypatch.setattr(BeaconModel, "read_scored", read_scored)
    ((head,),) = model.compress_documents([numbers(encoder._heads["en"])], ratio=None)
    text = numbers(2 * encoder.window + 100, 4)
    parts = [*encoder.encode([text], ratio=2, language="en", memory=[head.slots], group_windows=1)]
    assert [part.tokens for (part,) in parts] == [encoder.window, encoder.window, 100]
    all_before = [len(head.slots) + number * encoder.window // 2 for number in range(3)]
    if together > 1:
        assert seen == all_before[:1] * 3
    elif positions is None:
        assert seen == all_before
    else:
        assert seen[0] == all_before[0] and all_before[0] < seen[1] < all_before[1] and seen[2] == seen[1]
        assert positions - 100 < seen[1] + encoder.window + longest <= positions
