"""What the connector decides without an engine: heads of ranks, tails kept rotated, memories refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from memory_worker.manifest import MemoryKey, MemoryShape
from memory_worker.messages import SegmentGroup, SegmentRange
from memory_worker.models.beacon import Rope
from memory_worker.recall.connector import MemoryConnector, MemoryLoads, _memory_of
from memory_worker.recall.loading import CacheLayer, Expected, LoadFailed, MemoryLoader, SlotRange, heads_of_rank

CONFIG = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 10000.0}
BLOCK = 16
LAYERS, KV_HEADS, HEAD_DIM = 2, 4, 16
NAME = "t/m/v:0-3"


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "held"),
    [
        (8, 1, [range(8)]),
        (8, 4, [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]),
        (2, 2, [range(0, 1), range(1, 2)]),
        (2, 8, [range(0, 1)] * 4 + [range(1, 2)] * 4),
        (1, 3, [range(0, 1)] * 3),
    ],
)
def test_ranks_hold_a_share_of_the_heads_or_a_copy_of_one(kv_heads: int, ranks: int, held: list[range]) -> None:
    assert [range(kv_heads)[heads_of_rank(kv_heads, ranks, rank)] for rank in range(ranks)] == held


def test_heads_that_cannot_be_shared_are_an_error() -> None:
    with pytest.raises(ValueError, match="6 KV heads cannot be shared by 4"):
        heads_of_rank(6, 4, 0)


class Cache:
    """A paged cache as simple as can be: `[2, layers, blocks * BLOCK, heads, head_dim]`."""

    def __init__(self, heads: int) -> None:
        self.slots = torch.full((2, LAYERS, 64 * BLOCK, heads, HEAD_DIM), float("nan"))
        self.layers = [CacheLayer(index, self._writer(index)) for index in range(LAYERS)]

    def _writer(self, layer: int) -> Any:
        def write(keys: torch.Tensor, values: torch.Tensor, mapping: torch.Tensor) -> None:
            self.slots[0, layer, mapping] = keys
            self.slots[1, layer, mapping] = values

        return write

    def read(self, wanted: SlotRange) -> torch.Tensor:
        positions = torch.arange(wanted.start, wanted.end)
        return self.slots[:, :, torch.tensor(wanted.blocks)[positions // BLOCK] * BLOCK + positions % BLOCK]


class Keeper:
    """Holds one memory in chunks of the given slots, and counts how often it is asked."""

    def __init__(self, *chunks: int, dtype: str = "float32") -> None:
        generator = torch.Generator().manual_seed(sum(chunks))
        self.whole = torch.randn(2, LAYERS, sum(chunks), KV_HEADS, HEAD_DIM, generator=generator)
        raw = self.whole.numpy()
        if dtype == "bfloat16":
            raw = self.whole.to(torch.bfloat16).view(torch.uint16).numpy()
            self.whole = self.whole.to(torch.bfloat16).float()
        starts = [sum(chunks[:i]) for i in range(len(chunks))]
        self.memory = SimpleNamespace(
            chunks=[raw[:, :, start : start + count] for start, count in zip(starts, chunks, strict=True)],
            slots=chunks,
            total_slots=sum(chunks),
            shape=MemoryShape(layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype),
            fingerprint="a" * 64,
            pools=(),
        )
        self.asked = 0

    def fetch(self, group: SegmentGroup) -> Any:
        assert group.name == NAME and group.ranges == (SegmentRange(MemoryKey("t", "m", "v"), 0, 3),)
        self.asked += 1
        return self.memory

    def loader(self, heads: slice = slice(None), **changes: Any) -> MemoryLoader:
        expected = Expected(LAYERS, KV_HEADS, HEAD_DIM, "a" * 64)._replace(**changes)
        return MemoryLoader(
            self.fetch, Rope.from_config(CONFIG), expected, heads=heads, block_size=BLOCK, dtype=torch.float32
        )

    def rotated(self) -> torch.Tensor:
        positions = torch.arange(self.memory.total_slots)
        keys = Rope.from_config(CONFIG).rotate(self.whole[0].transpose(1, 2), positions).transpose(1, 2)
        return torch.stack([keys, self.whole[1]])


@pytest.fixture(autouse=True)
def chunks_are_their_own_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda reference: reference)


def wanted(slots: int, start: int = 0, first_block: int = 3) -> SlotRange:
    blocks = tuple(first_block + 2 * i for i in range(-(-slots // BLOCK)))
    return SlotRange(NAME, slots, start, slots, blocks)


@pytest.mark.parametrize("in_time", [True, False])
def test_loads_that_would_come_after_the_forward_pass_are_refused(in_time: bool) -> None:
    """vLLM loads before it only where the scheduler says that there are synchronous loads."""
    connector = MemoryConnector.__new__(MemoryConnector)
    connector._pending, connector._reading = MemoryLoads(ranges=[wanted(40)]), {}
    loads = connector.build_connector_meta(SimpleNamespace(has_sync_kv_loads=in_time, num_scheduled_tokens={}))
    assert loads.ranges == ([wanted(40)] if in_time else [])
    assert [blocks for _, blocks in loads.refused] == ([] if in_time else [wanted(40).blocks])
    assert connector._pending == MemoryLoads()


def test_each_step_says_which_of_its_requests_read_what() -> None:
    """By their first blocks, which a request that is preempted and comes back has anew."""
    connector: Any = MemoryConnector.__new__(MemoryConnector)
    connector._pending, connector._reading = MemoryLoads(), {}

    def step(*requests: str) -> dict[int, tuple[str, int]]:
        now: Any = SimpleNamespace(has_sync_kv_loads=True, num_scheduled_tokens=dict.fromkeys(requests, 1))
        found: MemoryLoads = connector.build_connector_meta(now)
        return found.read

    def begin(name: str, block: int, **asked: Any) -> Any:
        request: Any = SimpleNamespace(
            request_id=name, kv_transfer_params=asked, cache_salt="s", num_prompt_tokens=20, num_tokens=20
        )
        connector.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: [[block, block + 1]]), 0)
        return request

    begin("a", 5, memory=NAME, num_memory_tokens=8)
    ended = begin("b", 9, memory=NAME, num_memory_tokens=8)
    begin("plain", 11)
    assert step("a", "b", "plain") == {5: (NAME, 8), 9: (NAME, 8)}
    assert step("b") == {9: (NAME, 8)}
    connector.request_finished(ended, [9, 10])
    begin("a", 7, memory=NAME, num_memory_tokens=8)
    assert step("a", "b", "plain") == {7: (NAME, 8)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunks", [(48,), (5, 45), (3, 20, 30, 1)])
@pytest.mark.parametrize("heads", [slice(0, 4), slice(2, 4), slice(1, 2)])
def test_slots_land_rotated_in_their_blocks(dtype: str, chunks: tuple[int, ...], heads: slice) -> None:
    keeper = Keeper(*chunks, dtype=dtype)
    cache, whole = Cache(heads.stop - heads.start), wanted(sum(chunks))
    keeper.loader(heads).load(whole, cache.layers, torch.device("cpu"))
    assert torch.equal(cache.read(whole), keeper.rotated()[:, :, :, heads])
    assert int((~cache.slots.isnan()).all(-1).all(-1).sum()) == 2 * LAYERS * sum(chunks)  # and nowhere else


@pytest.mark.parametrize("chunks", [(50,), (40, 10), (49, 1), (9,)])
def test_a_tail_is_rotated_once_and_written_for_each_question(chunks: tuple[int, ...]) -> None:
    keeper = Keeper(*chunks)
    loader, slots = keeper.loader(), sum(chunks)
    loader.load(wanted(slots), Cache(KV_HEADS).layers, torch.device("cpu"))
    for first_block in (1, 20):
        cache, tail = Cache(KV_HEADS), wanted(slots, slots - slots % BLOCK, first_block)
        loader.load(tail, cache.layers, torch.device("cpu"))
        assert torch.equal(cache.read(tail), keeper.rotated()[:, :, tail.start :])
    assert (keeper.asked, loader.stats.tail_hits, loader.stats.rotated_slots) == (1, 2, slots)


def test_a_range_from_the_middle_is_rotated_to_its_own_slots() -> None:
    keeper = Keeper(30, 30, 30)
    cache, rest = Cache(KV_HEADS), wanted(90, start=2 * BLOCK)
    keeper.loader().load(rest, cache.layers, torch.device("cpu"))
    assert torch.equal(cache.read(rest), keeper.rotated()[:, :, 2 * BLOCK :])


@pytest.mark.parametrize(
    ("changes", "slots", "message"),
    [
        ({}, 41, "counts 41 slots, but the memory has 40"),
        ({"layers": 3}, 40, "2 layers, 4 heads and 16 dimensions a head, but the engine 3, 4 and 16"),
        ({"fingerprint": "b" * 64}, 40, "encoded by the model aaaaaaaaaaaa, but the engine runs bbbbbbbbbbbb"),
    ],
)
def test_a_memory_that_does_not_fit_the_engine_is_refused(changes: Any, slots: int, message: str) -> None:
    with pytest.raises(LoadFailed, match=message):
        Keeper(40).loader(**changes).load(wanted(slots), Cache(KV_HEADS).layers, torch.device("cpu"))


@pytest.mark.parametrize(
    ("salt", "memory", "slots", "reason"),
    [
        (None, NAME, 8, "has no cache_salt"),
        ("", NAME, 8, "has no cache_salt"),
        ("s", None, 8, "is no text"),
        ("s", "t/m/v", 8, "does not name segments"),
        ("s", "t/m/v:0", 8, "does not name segments"),
        ("s", "t/../m/v:0-1", 8, "does not name segments"),
        ("s", f"{NAME}+", 8, "does not name segments"),
        ("s", f"{NAME}+u/m:0-1", 8, "does not name segments"),
        ("s", NAME, 20, "not between 1 and its 20 prompt tokens"),
        ("s", NAME, 0, "not between 1 and"),
        ("s", NAME, "8", "not between 1 and"),
    ],
)
def test_a_request_that_names_no_group_is_refused_with_its_reason(
    salt: Any, memory: Any, slots: Any, reason: str
) -> None:
    asked = {"memory": memory, "num_memory_tokens": slots}
    request: Any = SimpleNamespace(kv_transfer_params=asked, cache_salt=salt, num_prompt_tokens=20)
    assert reason in str(_memory_of(request))


def test_a_group_of_several_memories_is_asked_by_its_name() -> None:
    name = f"{NAME}+t/other/v000002-00000000:4-17"
    asked = {"memory": name, "num_memory_tokens": 8}
    request: Any = SimpleNamespace(kv_transfer_params=asked, cache_salt="s", num_prompt_tokens=20)
    assert _memory_of(request) == SlotRange(name, 8, 0, 8, ())


def test_a_chunk_of_another_shape_is_refused() -> None:
    keeper = Keeper(40)
    keeper.memory.chunks[0] = keeper.memory.chunks[0][:, :1]
    with pytest.raises(LoadFailed, match="a chunk has the shape"):
        keeper.loader().load(wanted(40), Cache(KV_HEADS).layers, torch.device("cpu"))
