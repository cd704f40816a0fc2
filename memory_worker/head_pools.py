"""Head budgets: how the KV heads of a layer share a segment file's slots where each keeps its own number of pairs.

The scheduler of an engine gives all heads of all layers the same slots. So the first slots of a file are a *pool*: of
`POOL_BLOCK` slots, those in one head's column are a block that may belong to any head of its group, the heads of a
layer that share. A group's blocks are counted slots first, columns within them (block `b * together + column`), and
its heads take theirs one after another. The slots behind the pool are one of every head, as in any other file.

`counts` say how many pairs of the pool each head has: int32 `[layers, groups, together]`, multiples of `POOL_BLOCK`,
of `groups * together` KV heads. The Memorizer packs pools, the connector finds each head's blocks in the cache.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

POOL_BLOCK = 32  # slots: what CPU attention needs, and twice what FlashAttention does

Counts = npt.NDArray[np.int32]  # [layers, groups, together]


def pool_slots(counts: Counts) -> int:
    """Slots of the pool."""
    return int(counts[0, 0].sum()) // counts.shape[2]


def check_counts(counts: Counts, layers: int, kv_heads: int, slots: int) -> None:
    """Raises `ValueError` unless `counts` are those of a pool in a file of so many slots."""
    if counts.ndim != 3 or counts.shape[0] != layers or counts.shape[1] * counts.shape[2] != kv_heads:
        raise ValueError(f"its counts {counts.shape} are not of {layers} layers and {kv_heads} heads")
    sums = counts.sum(axis=2, dtype=np.int64)
    pool = int(sums[0, 0]) // counts.shape[2]
    if (counts < 0).any() or (counts % POOL_BLOCK).any() or pool % POOL_BLOCK or (sums != pool * counts.shape[2]).any():
        raise ValueError("its counts do not share out whole blocks, equally many in every layer")
    if pool > slots:
        raise ValueError(f"its counts share out {pool} slots, and it has {slots}")


def pack(kept: npt.NDArray[np.bool_], counts: Counts, block: int = POOL_BLOCK) -> npt.NDArray[np.int64]:
    """Which pair lies in each slot of each column, as `head * places + place`: `[layers, kv_heads, slots]`.

    `kept` `[layers, kv_heads, places]` are the pairs that are kept: of each head its count and, behind the pool,
    equally many more. A head's come in the order of their places.
    """
    layers, heads, places = kept.shape
    groups, together = counts.shape[1:]
    slots = int(kept[0, 0].sum()) - int(counts[0, 0, 0]) + pool_slots(counts)
    cells = np.empty((layers, heads, slots), np.int64)
    for layer in range(layers):
        for group in range(groups):
            columns = range(group * together, (group + 1) * together)
            pairs = [np.flatnonzero(kept[layer, head]) + head * places for head in columns]
            own = counts[layer, group]
            pool = np.concatenate([some[:count] for some, count in zip(pairs, own, strict=True)])
            behind = np.stack([some[count:] for some, count in zip(pairs, own, strict=True)])
            blocks = pool.reshape(-1, together, block).transpose(1, 0, 2).reshape(together, -1)
            cells[layer, group * together : (group + 1) * together] = np.concatenate([blocks, behind], axis=1)
    return cells


def slot_order(slots: int, pools: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """At which slot of the prompt each slot of a memory lies: those of all pools first, which so begin with a block.

    `pools` are the first slot of each and how many it has.
    """
    pooled = np.zeros(slots, np.bool_)
    for first, count in pools:
        pooled[first : first + count] = True
    order = np.empty(slots, np.int64)
    order[pooled] = np.arange(pooled.sum())
    order[~pooled] = np.arange(pooled.sum(), slots)
    return order


def head_blocks(pools: Sequence[Counts], block: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Where each head's pairs lie in a cache of blocks of `block` slots, pools one after another from block 0 on.

    Numbers of blocks `[layers, kv_heads]`, and the blocks as `block * kv_heads + column`, `[layers, kv_heads, most]`,
    0 where a head has no more. `block` must divide `POOL_BLOCK`.
    """
    layers, heads = pools[0].shape[0], pools[0].shape[1] * pools[0].shape[2]
    found: list[list[list[npt.NDArray[np.int64]]]] = [[[] for _ in range(heads)] for _ in range(layers)]
    parts = POOL_BLOCK // block
    first = 0
    for counts in pools:
        together = counts.shape[2]
        ends = (counts // POOL_BLOCK).cumsum(axis=2)
        for layer in range(layers):
            for head in range(heads):
                group, at = divmod(head, together)
                end = int(ends[layer, group, at])
                own = np.arange(end - int(counts[layer, group, at]) // POOL_BLOCK, end)
                rows = first + (own // together)[:, None] * parts + np.arange(parts)
                columns = group * together + own % together
                found[layer][head].append((rows * heads + columns[:, None]).ravel())
        first += pool_slots(counts) // block
    numbers = np.array([[sum(map(len, own)) for own in of_layer] for of_layer in found], np.int32)
    blocks = np.zeros((layers, heads, int(numbers.max())), np.int32)
    for layer in range(layers):
        for head in range(heads):
            blocks[layer, head, : numbers[layer, head]] = np.concatenate(found[layer][head])
    return numbers, blocks
