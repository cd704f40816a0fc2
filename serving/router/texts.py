"""Whole documents, for the task that answers from all of the text: read by the Router from storage."""

import asyncio
from collections.abc import Sequence

from cluster.storage.durable import Storage
from generator_worker.messages import Source
from memory_worker.manifest import Manifest


class Texts:
    """The texts that memories are made of. Raises `DamagedFile` where one is."""

    def __init__(self, storage_root: str) -> None:
        self._storage_root = storage_root

    async def read(self, manifests: Sequence[Manifest]) -> tuple[Source, ...]:
        """Every document of every memory, whole, in order."""
        return await asyncio.to_thread(self._read, manifests)

    def _read(self, manifests: Sequence[Manifest]) -> tuple[Source, ...]:
        storage = Storage(self._storage_root)
        sources = []
        for manifest in manifests:
            for document in manifest.documents:
                text = bytes(storage.read(document.source)).decode()
                sources.append(Source(text))
        return tuple(sources)
