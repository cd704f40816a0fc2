"""Pools: every pair that is kept lies in exactly one slot, and each head's blocks hold its own pairs in order."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from memory_worker.errors import DamagedMemory
from memory_worker.head_pools import POOL_BLOCK, check_counts, head_blocks, pack, pool_slots, slot_order
from memory_worker.manifest import MemoryShape
from memory_worker.memorize.kinds.pruned import choose_pairs
from memory_worker.storage.segments import Segment, write_slots
from memory_worker.storage.store import MemoryStore

LAYERS, HEADS = 2, 4
SHAPE = MemoryShape(layers=LAYERS, kv_heads=HEADS, head_dim=8, dtype="float32")


def scores(places: int, seed: int = 3) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.rand(LAYERS, HEADS, 1, generator=made) ** 3 * torch.rand(LAYERS, HEADS, places, generator=made)


@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize(("places", "slots"), [(700, 350), (700, 100), (64, 32), (900, 70), (90, 31)])
@pytest.mark.parametrize("block", [32, 16])
def test_each_heads_blocks_hold_its_pairs(together: int, places: int, slots: int, block: int) -> None:
    kept, counts = choose_pairs(scores(places), slots, together, POOL_BLOCK)
    check_counts(counts, LAYERS, HEADS, slots)
    cells = pack(kept.numpy(), counts)
    assert cells.shape == (LAYERS, HEADS, slots)
    pool = pool_slots(counts)
    assert pool == slots // POOL_BLOCK * POOL_BLOCK
    numbers, blocks = head_blocks([counts], block)
    assert (numbers * block == counts.reshape(LAYERS, HEADS)).all()
    for layer in range(LAYERS):
        for head in range(HEADS):
            own = np.flatnonzero(kept[layer, head].numpy()) + head * places
            at = blocks[layer, head, : numbers[layer, head]]
            of_blocks = cells[layer, :, :pool].reshape(HEADS, -1, block).transpose(1, 0, 2).reshape(-1, block)[at]
            assert [*of_blocks.ravel(), *cells[layer, head, pool:]] == [*own]
            assert {place % HEADS // together for place in at} <= {head // together}


@pytest.mark.parametrize("together", [1, 2, 4])
def test_what_is_kept_is_the_best_of_the_heads_that_share(together: int) -> None:
    """In blocks of one pair, it is the best of them together, as AdaKV keeps them; alike, the best of each."""
    found = scores(300)
    kept, _ = choose_pairs(found, 100, together, 1)
    best = found.view(LAYERS, HEADS // together, -1).topk(100 * together, dim=-1)
    right = torch.zeros(LAYERS, HEADS // together, 300 * together, dtype=torch.bool).scatter_(2, best.indices, True)
    assert torch.equal(kept, right.view_as(kept))


def test_more_of_the_scores_is_kept_together_than_alike() -> None:
    found = scores(1000)
    sums = [float(found[choose_pairs(found, 250, together, POOL_BLOCK)[0]].sum()) for together in (1, 2, 4)]
    assert sums[0] < sums[1] < sums[2]
    single = float(found[choose_pairs(found, 250, 4, 1)[0]].sum())
    assert sums[2] > single - 0.1 * (single - sums[0]), "blocks cost little"


def test_of_equal_scores_the_first_are_kept() -> None:
    kept, counts = choose_pairs(torch.ones(1, 2, 200), 70, 2, POOL_BLOCK)
    assert counts.tolist() == [[[128, 0]]]  # all blocks are worth the same: those of the first head
    assert kept[0].sum(dim=1).tolist() == [134, 6]
    assert kept[0, 0, :134].all() and kept[0, 1, :6].all()


def test_pools_of_several_segments_follow_one_another() -> None:
    counts = [choose_pairs(scores(count, seed), count // 2, 4, POOL_BLOCK)[1] for seed, count in ((1, 300), (2, 170))]
    alone = [head_blocks([one], 16) for one in counts]
    numbers, blocks = head_blocks(counts, 16)
    first = pool_slots(counts[0]) // 16 * HEADS
    for layer in range(LAYERS):
        for head in range(HEADS):
            own = [part[layer, head, : n[layer, head]] + at for (n, part), at in zip(alone, (0, first), strict=True)]
            assert [*blocks[layer, head, : numbers[layer, head]]] == [*np.concatenate(own)]
    order = slot_order(10 + 150 + 3 + 85, [(10, 128), (163, 64)])
    assert sorted(order) == [*range(248)]
    assert [*order[10:138]] == [*range(128)] and [*order[163:227]] == [*range(128, 192)]
    assert [*order[:10]] == [*range(192, 202)] and order[-1] == 247


def test_a_file_keeps_its_counts(tmp_path: Path) -> None:
    _, counts = choose_pairs(scores(200), 70, 2, POOL_BLOCK)
    keys = torch.randn(LAYERS, HEADS, 70, 8)
    store = MemoryStore(str(tmp_path))
    read = store.read_segment(store.write_segment("s.safetensors", SHAPE, [(keys, keys + 1)], counts))
    assert read.counts is not None and np.array_equal(read.counts, counts)
    assert all(torch.equal(*pair) for pair in zip(read.tensors(), (keys, keys + 1), strict=True))
    assert store.read_segment(store.write_segment("t.safetensors", SHAPE, [(keys, keys)])).counts is None


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([[[64, 0], [32, 32]], [[32, 32], [0, 0]]], "equally many in every layer"),
        ([[[64, 0], [32, 0]], [[32, 32], [64, 0]]], "equally many in every layer"),
        ([[[63, 1], [32, 32]], [[32, 32], [64, 0]]], "whole blocks"),
        ([[[96, -32], [32, 32]], [[32, 32], [64, 0]]], "whole blocks"),
        ([[[128, 64], [96, 96]], [[96, 96], [192, 0]]], "share out 96 slots, and it has 70"),
        ([[[32], [32]], [[32], [32]]], "are not of 2 layers and 4 heads"),
        ([[[32, 32, 32, 32]]], "are not of 2 layers and 4 heads"),
    ],
)
def test_counts_of_no_pool_are_refused(counts: list[list[list[int]]], reason: str) -> None:
    keys = torch.randn(LAYERS, HEADS, 70, 8)
    wrong = np.array(counts, np.int32)
    with pytest.raises(ValueError, match=reason):
        write_slots(io.BytesIO(), SHAPE, [(keys, keys)], wrong)
    good = np.full((LAYERS, 2, 2), 32, np.int32)
    sink = io.BytesIO()
    write_slots(sink, SHAPE, [(keys, keys)], good)
    data = bytearray(sink.getvalue())
    if wrong.shape == good.shape:
        start = 8 + int.from_bytes(data[:8], "little")
        data[start : start + good.nbytes] = wrong.tobytes()
        with pytest.raises(DamagedMemory, match=reason):
            Segment(pa.py_buffer(bytes(data)), "file")
