"""The keepers of other nodes, asked for what one's own node lacks before storage is: used by `MemoryKeeper`."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from cluster.actors import actor_names
from cluster.ray_internals import nodes_of_ranks
from cluster.routing import MemoryRouting, rank_of
from memory_worker.head_pools import Counts
from memory_worker.manifest import MemoryShape

logger = logging.getLogger(__name__)

KEEPER = "memory-keeper-"  # a keeper's actor name, before its node's id
_ASKED = 3  # peers at most for one file
_ANSWER_S = 0.5  # a peer that takes longer to say what it has is not waited for
_TRANSFER_S = 30.0  # nor one whose bytes take longer; storage is read then
_LOOKED_UP_S = 10.0  # how long the list of peers is believed


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A segment file in some node's object store. `chunks[i]` is `[2, layers, slots[i], kv_heads, head_dim]`."""

    shape: MemoryShape
    chunks: tuple[ray.ObjectRef, ...]
    slots: tuple[int, ...]
    bytes: int
    counts: Counts | None = None  # of the pool that the first slots are, where heads have budgets


class Peers:
    """The keepers of a namespace but one's own: for a memory those few are asked that its questions are sent to.

    They are the one on the node of the memory's home, by the order of `MemoryRouting`, then the next in that order,
    where questions go while the home has much to do. A file that none of them has is read from storage, however many
    more nodes there are.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._routing = MemoryRouting()
        self._nodes: list[str] = []  # as the routing counts them; one with several ranks more than once
        self._looked_up = -_LOOKED_UP_S

    async def fetch(self, memory: str, tenant: str, digest: str) -> tuple[HeldFile, list[npt.NDArray[Any]]] | None:
        """The file as a peer holds it, with its bytes in this node's object store for as long as they are referred to.

        `memory` is what requests are routed by, `SegmentGroup.name`. None where none of those asked has it, or says so
        in time: nothing that goes wrong with a peer is an error here.
        """
        if time.monotonic() - self._looked_up > _LOOKED_UP_S:
            await asyncio.to_thread(self._look_up)
            self._looked_up = time.monotonic()
        for node in self._order(memory):
            try:
                if held := await asyncio.wait_for(self._ask(node, tenant, digest), _ANSWER_S):
                    # In a thread: a transfer may take its time. The arrays are mapped from shared memory, not copied.
                    return held, await asyncio.to_thread(ray.get, list(held.chunks), timeout=_TRANSFER_S)
            except (ray.exceptions.RayError, TimeoutError, ValueError) as error:
                logger.info("%s is not had from the keeper of node %s: %r", digest, node, error)
        return None

    async def _ask(self, node: str, tenant: str, digest: str) -> HeldFile | None:
        """Raises `ValueError` where that keeper has ended."""
        peer = await asyncio.to_thread(ray.get_actor, KEEPER + node, self._namespace)
        held: HeldFile | None = await peer.held.remote(tenant, digest)
        return held

    def _order(self, memory: str) -> list[str]:
        """The nodes to ask, the likeliest first."""
        nodes = dict.fromkeys(self._nodes[index] for index in self._routing.order(memory))
        return list(nodes)[:_ASKED]

    def _look_up(self) -> None:
        own = ray.get_runtime_context().get_node_id()
        others = {name.removeprefix(KEEPER) for name in actor_names(self._namespace, KEEPER)} - {own}
        known = nodes_of_ranks(self._namespace)
        placed = [(rank, node) for rank, node in known.items() if node in others]
        placed += [(rank_of({}, node), node) for node in others - set(known.values())]
        self._nodes = [node for _, node in placed]
        self._routing.set_ranks([rank for rank, _ in placed])


def put_copies(arrays: list[npt.NDArray[Any]]) -> tuple[ray.ObjectRef, ...]:
    """References of one's own to these arrays: a peer's end with the peer."""
    return tuple(ray.put(np.asarray(array)) for array in arrays)
