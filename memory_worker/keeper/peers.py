"""The keepers of other nodes, asked for what one's own node lacks before storage is: used by `MemoryKeeper`."""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from cluster.actors import actor_names
from memory_worker.storage.manifest import MemoryShape

logger = logging.getLogger(__name__)

KEEPER = "memory-keeper-"  # a keeper's actor name, before its node's id
_ANSWER_S = 1.0  # a peer that takes longer to say what it has is not waited for
_TRANSFER_S = 30.0  # nor one whose bytes take longer; storage is read then
_LOOKED_UP_S = 10.0  # how long the list of peers is believed


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A segment file in some node's object store. `chunks[i]` is `[2, layers, slots[i], kv_heads, head_dim]`."""

    shape: MemoryShape
    chunks: tuple[ray.ObjectRef, ...]
    slots: tuple[int, ...]
    bytes: int


class Peers:
    """All keepers of a namespace but one's own."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._peers: list[Any] = []
        self._looked_up = -_LOOKED_UP_S

    async def fetch(self, tenant: str, digest: str) -> tuple[HeldFile, list[npt.NDArray[Any]]] | None:
        """The file as a peer holds it, with its bytes in this node's object store for as long as they are referred to.

        None where no peer has it, or says so in time: nothing that goes wrong with a peer is an error here.
        """
        if time.monotonic() - self._looked_up > _LOOKED_UP_S:
            self._peers = await asyncio.to_thread(self._others)
            self._looked_up = time.monotonic()
        held = await self._first(tenant, digest)
        if held is None:
            return None
        try:
            # In a thread: the arrays are mapped from shared memory, not copied, and a transfer may take its time.
            return held, await asyncio.to_thread(ray.get, list(held.chunks), timeout=_TRANSFER_S)
        except ray.exceptions.RayError as error:
            logger.info("a peer's copy of %s is gone, it is read from storage: %r", digest, error)
            return None

    async def _first(self, tenant: str, digest: str) -> HeldFile | None:
        """What the first peer that has it says."""

        async def ask(peer: Any) -> HeldFile | None:
            held: HeldFile | None = await peer.held.remote(tenant, digest)
            return held

        asking = {asyncio.create_task(ask(peer)) for peer in self._peers}
        deadline = time.monotonic() + _ANSWER_S
        try:
            while asking and (left := deadline - time.monotonic()) > 0:
                done, asking = await asyncio.wait(asking, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is None and (held := task.result()) is not None:
                        return held
                    if error is not None and not isinstance(error, ray.exceptions.RayError):
                        raise error
            return None
        finally:
            for task in asking:
                task.cancel()

    def _others(self) -> list[Any]:
        own, peers = KEEPER + ray.get_runtime_context().get_node_id(), []
        for name in actor_names(self._namespace, KEEPER):
            if name != own:
                with contextlib.suppress(ValueError):  # it has ended meanwhile
                    peers.append(ray.get_actor(name, self._namespace))
        return peers


def put_copies(arrays: list[npt.NDArray[Any]]) -> tuple[ray.ObjectRef, ...]:
    """References of one's own to these arrays: a peer's end with the peer."""
    return tuple(ray.put(np.asarray(array)) for array in arrays)
