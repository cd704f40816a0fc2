"""vLLM's CPU attention over memories whose heads share their slots, written by the loader: what plain attention over
each head's own pairs gives."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from cluster.vllm_internals import attention_by_head
from memory_worker.head_pools import POOL_BLOCK
from memory_worker.manifest import MemoryShape
from memory_worker.memorize.kinds.pruned import choose_pairs, prune
from memory_worker.messages import SegmentGroup
from memory_worker.models.beacon import Rope, Slots
from memory_worker.recall.head_tables import head_sequences
from memory_worker.recall.loading import CacheLayer, Expected, LoadFailed, MemoryLoader, SlotRange

LAYERS, KV_HEADS, GROUP, DIM, BLOCK, HEAD = 2, 3, 3, 64, 32, 7
ROPE = Rope.from_config({"hidden_size": DIM, "num_attention_heads": 1, "rope_theta": 10000.0})
DEVICE = torch.device("cpu")


class Stored:
    """A memory of segments of so many tokens, pruned: as the keeper has it, and which pairs each head may see."""

    def __init__(self, tokens: tuple[int, ...], ratio: int, seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        parts = [(torch.randn(2, LAYERS, KV_HEADS, HEAD, DIM, generator=made), None)]
        pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        slots = HEAD
        pairs.append((*parts[0][0], torch.ones(LAYERS, KV_HEADS, HEAD, dtype=torch.bool)))
        places = [torch.arange(HEAD)]
        for count in tokens:
            whole = Slots(*torch.randn(2, LAYERS, KV_HEADS, count, DIM, generator=made))
            scores = torch.rand(LAYERS, KV_HEADS, 1, generator=made) ** 4 * torch.rand(
                LAYERS, KV_HEADS, count, generator=made
            )
            kept, _, counts = prune(whole, scores, -(-count // ratio), ROPE, together=KV_HEADS)
            parts.append((torch.stack([kept.keys, kept.values]), counts))
            slots += len(kept)
            seen, _ = choose_pairs(scores, len(kept), KV_HEADS, POOL_BLOCK)
            pairs.append((whole.keys, whole.values, seen))
            places.append(torch.arange(slots - count, slots))
        chunks, starts = [part.transpose(2, 3).contiguous().numpy() for part, _ in parts], [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.shape[2])
        self.slots = slots
        self.kept = SimpleNamespace(
            chunks=chunks,
            slots=[chunk.shape[2] for chunk in chunks],
            total_slots=slots,
            shape=MemoryShape(layers=LAYERS, kv_heads=KV_HEADS, head_dim=DIM, dtype="float32"),
            fingerprint="a" * 64,
            pools=[(at, counts) for at, (_, counts) in zip(starts, parts, strict=False) if counts is not None],
        )
        at = torch.cat(places)
        keys = ROPE.rotate_layers(torch.cat([keys for keys, _, _ in pairs], dim=2), at)
        values, seen = (torch.cat([pair[i] for pair in pairs], dim=2) for i in (1, 2))
        self.pairs = [
            [(keys[layer, head, shown], values[layer, head, shown]) for head, shown in enumerate(seen[layer])]
            for layer in range(LAYERS)
        ]


@pytest.fixture(autouse=True)
def chunks_are_their_own_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda reference: reference)


def loader_of(memories: dict[str, Stored], **changes: Any) -> MemoryLoader:
    def fetch(group: SegmentGroup) -> Any:
        return memories[group.ranges[0].key.memory].kept

    settings = {"heads": slice(0, KV_HEADS), "block_size": BLOCK, "dtype": torch.float32} | changes
    return MemoryLoader(fetch, ROPE, Expected(LAYERS, KV_HEADS, DIM, "a" * 64), **settings)


def group_of(name: str) -> str:
    return f"t/{name}/v:0-1"


@pytest.mark.parametrize("together", [False, True])
def test_each_head_sees_its_own_pairs(together: bool) -> None:
    """Two memories, one of several segments, and a request without any; loaded whole, or block by block."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    impl = attention_by_head("CPU_ATTN").get_impl_cls()(KV_HEADS * GROUP, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
    assert impl.attends_by_head
    isa = "vec"
    layers = [
        SimpleNamespace(
            isa=isa, layer_name=f"model.layers.{i}.attn", kv_cache_dtype="auto", _k_scale_float=1.0, _v_scale_float=1.0
        )
        for i in range(LAYERS)
    ]
    caches = [torch.zeros(64, KV_HEADS, BLOCK, 2 * DIM) for _ in range(LAYERS)]

    def writer(layer: int) -> Any:
        def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
            impl.do_kv_cache_update(layers[layer], keys.contiguous(), values.contiguous(), caches[layer], slots)

        return write

    memories = {"one": Stored((421, 90), 3, 1), "two": Stored((300,), 2, 2)}
    loader = loader_of(memories)
    made = torch.Generator().manual_seed(3)
    free = torch.randperm(64, generator=made).tolist()
    after, asked = (50, 9, 70), (40, 1, 3)
    held = [memories["one"], memories["two"], None]
    tables = [
        [free.pop() for _ in range(-(-((m.slots if m else 0) + n) // BLOCK))] for m, n in zip(held, after, strict=True)
    ]
    cache_layers = [CacheLayer(index, writer(index), True) for index in range(LAYERS)]
    for (name, memory), table in zip(memories.items(), tables, strict=False):
        cuts = [0, memory.slots] if together else [0, 2 * BLOCK, memory.slots - memory.slots % BLOCK, memory.slots]
        for start, end in pairwise(cuts):
            wanted = SlotRange(group_of(name), memory.slots, start, end, tuple(table))
            loader.load(wanted, cache_layers, DEVICE)
        loader.load(SlotRange(group_of(name), memory.slots, cuts[-2], memory.slots, tuple(table)), cache_layers, DEVICE)
    lengths = torch.tensor([(m.slots if m else 0) + n for m, n in zip(held, after, strict=True)], dtype=torch.int32)
    starts = torch.tensor([0, *asked]).cumsum(0).to(torch.int32)
    width = max(map(len, tables))
    table = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32)
    heads = [loader.memory_heads(group_of(n), m.slots, DEVICE) for n, m in memories.items()]
    metadata = CPUAttentionMetadata(
        num_actual_tokens=sum(asked), max_query_len=max(asked), query_start_loc=starts, max_seq_len=int(lengths.max()),
        seq_lens=lengths, block_table=table, slot_mapping=torch.empty(0), scheduler_metadata=None,
    )  # fmt: skip
    metadata.head_sequences = head_sequences([*heads, None], table, lengths, starts, block=BLOCK, kv_heads=KV_HEADS)
    for index in range(LAYERS):
        new = [torch.randn(2, n, KV_HEADS, DIM, generator=made) for n in after]
        for memory, (keys, values), own in zip(held, new, tables, strict=True):
            at = torch.arange(len(keys)) + (memory.slots if memory else 0)
            writer(index)(keys, values, torch.tensor(own)[at // BLOCK] * BLOCK + at % BLOCK)
        queries = torch.randn(sum(asked) + 5, KV_HEADS * GROUP, DIM, generator=made)  # with padding, as of a graph
        output = torch.zeros_like(queries)
        impl.forward(layers[index], queries, None, None, caches[index], metadata, output)
        for request, memory in enumerate(held):
            rows = slice(int(starts[request]), int(starts[request + 1]))
            for head in range(KV_HEADS):
                before = memory.pairs[index][head] if memory else (torch.empty(0, DIM), torch.empty(0, DIM))
                keys, values = (torch.cat([before[i], new[request][i, :, head]]) for i in (0, 1))
                own = slice(head * GROUP, (head + 1) * GROUP)
                allowed = torch.ones(asked[request], len(keys), dtype=torch.bool).tril(len(keys) - asked[request])
                right = torch.nn.functional.scaled_dot_product_attention(
                    queries[rows, own].transpose(0, 1), keys[None], values[None], attn_mask=allowed
                )
                torch.testing.assert_close(output[rows, own].transpose(0, 1), right, atol=1e-4, rtol=1e-4)
        assert not output[sum(asked) :].any()


def test_a_batch_in_which_no_head_has_a_budget_goes_through_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = attention_by_head("CPU_ATTN").get_impl_cls()(KV_HEADS * GROUP, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
    given: list[Any] = []
    stock = type(impl).__mro__[1]
    monkeypatch.setattr(stock, "forward", lambda self, *arguments: given.append(arguments) or "output")
    metadata, cache = SimpleNamespace(head_sequences=None), torch.zeros(1, KV_HEADS, BLOCK, 2 * DIM)
    arguments = ("layer", "query", "key", "value", cache, metadata, "output")
    assert impl.forward(*arguments) == "output" and given == [arguments]


@pytest.mark.parametrize(
    ("layers", "changes", "reason"),
    [
        ([CacheLayer(0, print, True), CacheLayer(1, print)], {}, "set memory.memorize.head_budgets to false"),
        ([CacheLayer(0, print, True)], {"heads": slice(0, 1)}, "this rank of the engine has heads 0 to 1"),
        ([CacheLayer(0, print, True)], {"block_size": 128}, "and blocks of 128"),
    ],
)
def test_an_engine_that_cannot_read_it_refuses_it(layers: list[CacheLayer], changes: Any, reason: str) -> None:
    memory = Stored((300,), 2, 2)
    wanted = SlotRange(group_of("two"), memory.slots, 0, memory.slots, tuple(range(20)))
    with pytest.raises(LoadFailed, match=reason):
        loader_of({"two": memory}, **changes).load(wanted, layers, DEVICE)
