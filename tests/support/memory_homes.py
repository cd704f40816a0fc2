"""Where the routing policy sends many memories."""

from cluster.routing import MemoryRouting

MEMORIES = [f"tenant/memory-{i}/v000001" for i in range(400)]


def policy(ranks, **options) -> MemoryRouting:
    routing = MemoryRouting(**options)
    routing.set_ranks(ranks)
    return routing


def homes(ranks, memories=MEMORIES) -> list[int]:
    ranks = list(ranks)
    routing = policy(ranks)
    return [ranks[routing.order(memory)[0]] for memory in memories]
