"""The model in training computes what `BeaconModel` computes, with gradients, and growing it changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memory_worker.models.beacon import BeaconModel
from memory_worker.training import TrainingError
from memory_worker.training.grow import grow
from memory_worker.training.layout import Layout
from memory_worker.training.model import Batch, TrainedModel
from tests.support.beacon_reference import VOCABULARY, write_checkpoint


def loaded(folder: Path) -> TrainedModel:
    model = TrainedModel(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def a_batch(layout: Layout, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    text = torch.randint(0, VOCABULARY, (2, layout.tokens), generator=random)
    tails = torch.randint(0, VOCABULARY, (2, layout.tails, layout.tail_tokens), generator=random)
    return Batch(layout, text, torch.zeros(text.shape), tails, torch.ones(tails.shape))


@pytest.mark.parametrize(
    "family", [{}, {"model_type": "llama", "bias": False, "tied": True, "tie_word_embeddings": True, "kv_heads": 4}]
)
@pytest.mark.parametrize(("head", "tokens", "ratio"), [(5, 60, 4), (0, 48, 2), (3, 3, 4), (4, 23, 8)])
def test_questions_after_a_memory_read_what_beacon_model_reads(tmp_path, family, head, tokens, ratio):
    folder = write_checkpoint(tmp_path, layers=3, beacon_window=16, **family)
    served, trained = BeaconModel.from_pretrained(folder), loaded(folder)
    batch = a_batch(Layout.cut(head, tokens, 16, [ratio], tails=3, tail_tokens=7))
    rows = trained.hidden(batch)[:, batch.layout.tokens : batch.layout.stock_rows].unflatten(1, (3, 7))
    logits = trained.read(rows)
    for text in range(2):
        memory = served.compress(batch.text[text], ratio=ratio, head=head)
        assert len(memory) == batch.layout.slots
        for tail in range(3):
            expected = served.logits(batch.tails[text, tail], memory)
            torch.testing.assert_close(logits[text, tail], expected, atol=1e-4, rtol=1e-4)


def test_the_loss_reaches_the_first_window_through_the_beacons_of_every_layer(tmp_path):
    model = loaded(write_checkpoint(tmp_path, layers=3, beacon_window=16))
    layout = Layout.cut(0, 48, 16, [2, 4, 8], tails=2, tail_tokens=5)
    batch = a_batch(layout)
    batch.text[:, :16] = 7  # a token that stands in the first window alone
    batch.text[:, 16:].clamp_(min=8)
    batch.tails.clamp_(min=8)
    loss, weight, _ = model(batch)
    assert float(weight) == 2 * 2 * 4 == float(batch.weight)  # a tail's first token is no target
    loss.backward()
    assert model.model.embed_tokens.weight.grad[7].abs().max() > 1e-4
    reached = {name for name, p in model.named_parameters() if "beacon" in name and p.grad.abs().max() > 1e-6}
    # What a beacon of the last layer asks for changes nothing that is kept of it.
    assert len(reached) == 1 + 3 * 6 - 2 and not [name for name in reached if "layers.2.self_attn.beacon_q" in name]


def test_recomputed_layers_give_the_same_gradients(tmp_path):
    batch = a_batch(Layout.cut(2, 34, 16, [4], tails=2, tail_tokens=5))
    gradients = []
    for recomputed in (False, True):
        model = loaded(write_checkpoint(tmp_path / str(recomputed), beacon_window=16))
        model.checkpoint_layers = recomputed
        model(batch)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_grown_model_says_the_same_and_can_learn_with_what_is_new(tmp_path):
    folder = write_checkpoint(tmp_path, beacon_window=16)
    small = loaded(folder)
    config = {**small.config, "beacon_window": 16}
    sizes = {"layers": 4, "hidden": 96, "heads": 8, "kv_heads": 4, "mlp": 160}
    grown, weights = grow(config, small.state_dict(), sizes, seed=0)
    large = TrainedModel(grown)
    large.load_state_dict(weights)
    batch = a_batch(Layout.cut(2, 34, 16, [4], tails=2, tail_tokens=5))
    rows = [model.read(model.hidden(batch)) for model in (small, large)]
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=1e-4)
    large(batch)[0].backward()
    top = large.model.layers[3]
    assert top.self_attn.o_proj.weight.grad.abs().max() > 0 and top.mlp.down_proj.weight.grad.abs().max() > 0
    with pytest.raises(TrainingError, match="growing only adds"):
        grow(config, small.state_dict(), {"hidden": 32}, seed=0)
    with pytest.raises(TrainingError, match="grow both alike"):
        grow(config, small.state_dict(), {"heads": 8}, seed=0)
