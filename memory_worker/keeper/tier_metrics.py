"""What the object-store tier of a node does, as Prometheus metrics of Ray (`ray_memorag_…`): reported by the keeper."""

from ray.util.metrics import Counter, Gauge


class TierMetrics:
    """The metrics of one keeper. Dropped outside Ray, and in a cluster that collects none."""

    def __init__(self) -> None:
        self._files = Counter(
            "memorag_segment_files", "segment files asked of a keeper, by the tier they were in", ("tenant", "tier")
        )
        self._moved = Counter(
            "memorag_moved_bytes", "bytes of segments brought to a node, by the tier they came from", ("tenant", "tier")
        )
        self._evicted = Counter("memorag_evicted_bytes", "bytes of segments let go by keepers")
        self._bytes = Gauge("memorag_resident_bytes", "bytes of segments in a node's object store")
        self._slots = Gauge("memorag_resident_slots", "memory slots in a node's object store")

    def count_hit(self, tenant: str) -> None:
        """A file was in this node's object store."""
        self._files.inc(tags={"tenant": tenant, "tier": "object_store"})

    def count_load(self, tenant: str, tier: str, size: int) -> None:
        """A file came from `peer` or `storage`."""
        self._files.inc(tags={"tenant": tenant, "tier": tier})
        self._moved.inc(max(size, 1), tags={"tenant": tenant, "tier": tier})

    def set_resident(self, size: int, slots: int) -> None:
        """What is kept now."""
        self._bytes.set(size)
        self._slots.set(slots)

    def count_eviction(self, size: int) -> None:
        self._evicted.inc(max(size, 1))
