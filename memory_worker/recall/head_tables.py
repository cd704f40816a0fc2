"""Block tables by head: what paged attention is told where the heads of a layer have memories of different lengths.

A cache `[blocks, kv_heads, block, …]` is also `[blocks * kv_heads, 1, block, …]`: blocks of one head each, of which
`block * kv_heads + column` may belong to any head. So each (request, KV head) becomes a sequence of its own, of one KV
head: first the head's blocks of the memory's pools (`head_pools`), then, of all further blocks, its column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from memory_worker.head_pools import Counts, head_blocks, pool_slots


@dataclass(frozen=True, slots=True, eq=False)
class MemoryHeads:
    """Where a memory's pairs lie that heads have in numbers of their own."""

    pool_blocks: int  # of the cache; the memory begins with them
    numbers: Tensor  # int32 [layers, kv_heads], blocks of each head
    blocks: Tensor  # int64 [layers, kv_heads, most]: index in the request's block table
    columns: Tensor  # int32, alike

    @classmethod
    def of(cls, pools: Sequence[Counts], block: int, device: torch.device) -> "MemoryHeads":
        """Of all pools of a memory, of the heads of this rank, in a cache of blocks of `block` slots."""
        numbers, places = (torch.from_numpy(each).to(device) for each in head_blocks(pools, block))
        heads = numbers.shape[1]
        first = sum(pool_slots(counts) for counts in pools) // block
        return cls(first, numbers, (places // heads).long(), places % heads)


@dataclass(frozen=True, slots=True, eq=False)
class HeadSequences:
    """The sequences of a batch, (request, KV head) after (request, KV head), as attention takes them."""

    rows: (
        Tensor | None
    )  # int64 [tokens * kv_heads]: of which `token * kv_heads + head` each query is; none, as they come
    starts: Tensor  # int32 [sequences + 1], of their queries
    lengths: Tensor  # int32 [layers, sequences], slots that each sees
    tables: Tensor  # int32 [layers, sequences, most], blocks of one head each
    longest: int


def head_sequences(
    memories: Sequence[MemoryHeads | None], table: Tensor, lengths: Tensor, starts: Tensor, *, block: int, kv_heads: int
) -> HeadSequences:
    """Of a batch of requests: the heads of each one's memory (one at least has some), block tables [requests, most],
    slots [requests], and starts of queries [requests + 1]."""
    requests, device = len(memories), table.device
    first = next(memory for memory in memories if memory)
    layers = len(first.numbers)
    ends, asked = lengths.tolist(), starts.tolist()
    heads = torch.arange(kv_heads, dtype=torch.int32, device=device)
    numbers = torch.zeros(layers, requests, kv_heads, dtype=torch.int32, device=device)
    before = torch.zeros(requests, dtype=torch.int32, device=device)  # blocks of pools
    tails = []
    for request, memory in enumerate(memories):
        pooled = memory.pool_blocks if memory else 0
        tails.append(table[request, pooled : -(-ends[request] // block), None] * kv_heads + heads)
        before[request] = pooled
        if memory:
            numbers[:, request] = memory.numbers
    most = max(
        (int(memory.numbers.max()) if memory else 0) + len(tail) for memory, tail in zip(memories, tails, strict=True)
    )
    tables = torch.zeros(layers, requests, kv_heads, most, dtype=torch.int32, device=device)
    for request, (memory, tail) in enumerate(zip(memories, tails, strict=True)):
        if not memory:
            tables[:, request, :, : len(tail)] = tail.T
            continue
        own = table[request, memory.blocks] * kv_heads + memory.columns
        tables[:, request, :, : own.shape[2]] = own
        places = memory.numbers[..., None].long() + torch.arange(len(tail), device=device)
        tables[:, request].scatter_(2, places, tail.T.expand(layers, -1, -1))
    seen = lengths[:, None] + (numbers - before[:, None]) * block
    counts = [end - start for start, end in pairwise(asked)]
    rows = None
    if any(count > 1 for count in counts):
        tokens = (torch.arange(start, end, device=device) for start, end in pairwise(asked))
        rows = torch.cat([(own * kv_heads + heads[:, None]).flatten() for own in tokens])
    each = torch.tensor(counts, device=device).repeat_interleave(kv_heads)
    return HeadSequences(
        rows,
        torch.nn.functional.pad(each.cumsum(0), (1, 0)).to(torch.int32),
        seen.flatten(1).to(torch.int32),
        tables.flatten(1, 2),
        most * block,
    )
