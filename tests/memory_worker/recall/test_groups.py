"""Groups hold every segment once and in order, as many together as a prompt takes."""

import random

import pytest

from benchmarks.support.stored_memories import SHAPE
from cluster.planning.costs import MemoryKind
from cluster.storage.durable import StoredFile
from memory_worker.errors import MemoryTooLarge
from memory_worker.manifest import DocumentEntry, Manifest, MemoryKey, SegmentEntry, now
from memory_worker.messages import SegmentGroup, SegmentRange
from memory_worker.recall.groups import memories_of, segment_groups

NOTHING = StoredFile(path="t/m/v/x", size=0, digest="0" * 64)


def version(memory: str, documents: list[list[int]], head: int = 5, kind: MemoryKind = "beacon") -> Manifest:
    """A version whose documents have segments of these slots."""
    return Manifest(
        tenant="t",
        memory=memory,
        version="v000001-00000000",
        created=now(),
        kind=kind,
        model="tiny",
        fingerprint="f",
        ratio=4,
        language="en",
        shape=SHAPE,
        head_tokens=tuple(range(head)),
        head=NOTHING,
        documents=tuple(
            DocumentEntry(
                id=f"d{number}",
                characters=1,
                source=NOTHING,
                segments=tuple(SegmentEntry(tokens=4 * s, slots=s, files=(NOTHING,)) for s in slots),
                passages=NOTHING,
                passage_count=1,
            )
            for number, slots in enumerate(documents)
        ),
    )


def key(memory: str) -> MemoryKey:
    return MemoryKey("t", memory, "v000001-00000000")


def test_what_fits_one_prompt_is_one_group() -> None:
    groups = segment_groups([version("a", [[10, 20], [30]]), version("b", [[7]], head=3)], 72)
    assert groups == (SegmentGroup((SegmentRange(key("a"), 0, 3), SegmentRange(key("b"), 0, 1)), 72),)
    assert memories_of(groups[0]) == "a, b"
    assert SegmentGroup.parse(groups[0].name, 72) == groups[0]


def test_a_group_begins_with_the_head_of_its_first_range() -> None:
    groups = segment_groups([version("a", [[10, 20], [30]]), version("b", [[7], [40]], head=3)], 50)
    assert groups == (
        SegmentGroup((SegmentRange(key("a"), 0, 2),), 35),
        SegmentGroup((SegmentRange(key("a"), 2, 3), SegmentRange(key("b"), 0, 1)), 42),
        SegmentGroup((SegmentRange(key("b"), 1, 2),), 43),
    )


def test_memories_of_different_kinds_share_no_group() -> None:
    manifests = [version("a", [[10]]), version("b", [[20]], kind="gist"), version("c", [[7]], kind="gist")]
    assert segment_groups(manifests, 100) == (
        SegmentGroup((SegmentRange(key("a"), 0, 1),), 15),
        SegmentGroup((SegmentRange(key("b"), 0, 1), SegmentRange(key("c"), 0, 1)), 32),
    )


def test_nothing_makes_no_group() -> None:
    assert segment_groups([], 10) == () == segment_groups([version("a", [])], 10)


def test_a_segment_that_does_not_fit_alone_is_an_error() -> None:
    assert len(segment_groups([version("a", [[10, 95]])], 100)) == 2
    with pytest.raises(MemoryTooLarge, match=r"'a' has 101 slots to be read together, more than the 100"):
        segment_groups([version("a", [[10, 96]])], 100)


def test_every_segment_once_in_order_within_the_bound_and_no_group_too_many() -> None:
    chance = random.Random(3)
    for _ in range(300):
        manifests = [
            version(f"m{n}", [[chance.randint(1, 40) for _ in range(chance.randint(0, 4))] for _ in range(3)], head)
            for n, head in enumerate(chance.choices((1, 5, 9), k=chance.randint(1, 4)))
        ]
        by_key = {key(m.memory): m for m in manifests}
        bound = chance.randint(49, 150)
        groups = segment_groups(manifests, bound)
        expected = [(key(m.memory), index) for m in manifests for index in range(len(m.segments))]
        read = [(r.key, index) for g in groups for r in g.ranges for index in range(r.first, r.end)]
        assert read == expected
        for number, group in enumerate(groups):
            slots = [s.slots for r in group.ranges for s in by_key[r.key].segments[r.first : r.end]]
            assert group.slots == by_key[group.ranges[0].key].head_slots + sum(slots) <= bound
            keys = [r.key for r in group.ranges]
            assert len(keys) == len(set(keys)), "consecutive segments of one version are one range"
            if number + 1 < len(groups):
                following = groups[number + 1].ranges[0]
                assert group.slots + by_key[following.key].segments[following.first].slots > bound
            assert SegmentGroup.parse(group.name, group.slots) == group
