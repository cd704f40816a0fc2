"""Which segments are read together: as many as one prompt holds. The Router asks each group at the same time."""

from collections.abc import Sequence

from memory_worker.errors import MemoryTooLarge
from memory_worker.manifest import Manifest
from memory_worker.messages import SegmentGroup, SegmentRange


def segment_groups(manifests: Sequence[Manifest], max_slots: int) -> tuple[SegmentGroup, ...]:
    """All segments of all these versions, in order, packed greedily into groups of at most `max_slots` slots.

    Memories of different kinds do not share a group. A group's slots include the head of its first range's version.
    Raises `MemoryTooLarge` for a segment that does not fit behind its head alone.
    """
    groups: list[SegmentGroup] = []
    ranges: list[SegmentRange] = []
    slots, kind = 0, ""
    for manifest in manifests:
        for index, segment in enumerate(manifest.segments):
            if ranges and (manifest.kind != kind or slots + segment.slots > max_slots):
                groups.append(SegmentGroup(tuple(ranges), slots))
                ranges = []
            if not ranges:
                slots, kind = manifest.head_slots, manifest.kind
                if slots + segment.slots > max_slots:
                    raise MemoryTooLarge(manifest.memory, slots + segment.slots, max_slots)
            if ranges and ranges[-1].key == manifest.key and ranges[-1].end == index:
                ranges[-1] = SegmentRange(manifest.key, ranges[-1].first, index + 1)
            else:
                ranges.append(SegmentRange(manifest.key, index, index + 1))
            slots += segment.slots
    return (*groups, SegmentGroup(tuple(ranges), slots)) if ranges else tuple(groups)


def memories_of(group: SegmentGroup) -> str:
    """The ids of the group's memories, for people to read."""
    return ", ".join(dict.fromkeys(r.key.memory for r in group.ranges))
