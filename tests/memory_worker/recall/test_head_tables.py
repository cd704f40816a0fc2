"""Block tables by head: each sequence sees, in order, its head's pairs of the pools and its column of all the rest."""

from typing import Any

import pytest
import torch

from memory_worker.head_pools import POOL_BLOCK, head_blocks, pool_slots
from memory_worker.memorize.kinds.pruned import choose_pairs
from memory_worker.recall.head_tables import MemoryHeads, head_sequences

LAYERS, HEADS = 2, 3


def pools(*lengths: int) -> list[Any]:
    made = torch.Generator().manual_seed(sum(lengths))
    return [
        choose_pairs(torch.rand(LAYERS, HEADS, 2 * n, generator=made) ** 5, n, HEADS, POOL_BLOCK)[1] for n in lengths
    ]


@pytest.mark.parametrize("block", [32, 16])
@pytest.mark.parametrize("asked", [(1, 1, 1, 1), (3, 1, 40, 2)])
def test_sequences_see_the_blocks_of_their_heads(block: int, asked: tuple[int, ...]) -> None:
    counts = [pools(170), None, pools(64, 96, 33), pools(40)]
    lengths = torch.tensor([230, 90, 300, 77], dtype=torch.int32)
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    table = ids[: 4 * 24].view(4, 24)
    starts = torch.tensor([0, *asked], dtype=torch.int32).cumsum(0).to(torch.int32)
    heads = [MemoryHeads.of(one, block, torch.device("cpu")) if one else None for one in counts]
    made = head_sequences(heads, table, lengths, starts, block=block, kv_heads=HEADS)
    assert made.starts.tolist() == [
        sum(n for n in asked[:r] for _ in range(HEADS)) + asked[r] * head for r in range(4) for head in range(HEADS)
    ] + [sum(asked) * HEADS]
    for layer in range(LAYERS):
        for request, one in enumerate(counts):
            numbers, blocks = head_blocks(one, block) if one else (None, None)
            pool = sum(map(pool_slots, one)) // block if one else 0
            for head in range(HEADS):
                sequence = request * HEADS + head
                own = [] if one is None else blocks[layer, head, : numbers[layer, head]].tolist()
                right = [int(table[request, at // HEADS]) * HEADS + at % HEADS for at in own]
                last = -(-int(lengths[request]) // block)
                right += [int(table[request, at]) * HEADS + head for at in range(pool, last)]
                assert made.tables[layer, sequence, : len(right)].tolist() == right
                seen = int(lengths[request]) + (len(own) - pool) * block
                assert int(made.lengths[layer, sequence]) == seen <= made.longest
                assert -(-seen // block) == len(right)
    if max(asked) == 1:
        assert made.rows is None
    else:
        assert made.rows is not None
        first, end = int(starts[2]), int(starts[3])
        at = int(made.starts[2 * HEADS + 1])
        assert made.rows[at : at + asked[2]].tolist() == [token * HEADS + 1 for token in range(first, end)]
        assert sorted(made.rows.tolist()) == [*range(sum(asked) * HEADS)]
