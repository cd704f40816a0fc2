"""The versions that questions are about: their manifests, and what is derived from them, kept by the Router.

A version is immutable, so it is read from storage once; what a question costs does not grow with its documents.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from ray.actor import ActorHandle

from cluster.errors import cause_of
from cluster.shared_cache import SharedCache
from cluster.storage.durable import DamagedFile
from memory_worker.errors import MemoryNotFound, WrongModel
from memory_worker.manifest import Manifest, MemoryKey
from memory_worker.messages import MemorizerDescription, SegmentGroup
from memory_worker.models.fingerprint import fingerprint_of
from memory_worker.recall.groups import segment_groups
from memory_worker.storage.store import MemoryStore
from retrieval_worker.messages import Index, IndexPart

_DOCUMENT_BYTES, _FILE_BYTES = 1800, 300  # of RAM, for each in a manifest and what is derived from it; a test measures


@dataclass(frozen=True)
class AskedVersions:
    """One version of each of some memories of a tenant, in the order they were named."""

    manifests: tuple[Manifest, ...]
    max_slots: int  # of one group

    @cached_property
    def index(self) -> Index:
        """What the Retriever searches."""
        return index_of(self.manifests)

    @cached_property
    def groups(self) -> tuple[SegmentGroup, ...]:
        """What the Recaller reads. Raises `MemoryTooLarge`."""
        return segment_groups(self.manifests, self.max_slots)


class Versions:
    """Versions of which `capacity_bytes` of RAM are kept, those asked most recently."""

    def __init__(self, storage_root: str, catalog: ActorHandle[Any], max_slots: int, capacity_bytes: int) -> None:
        self._store = MemoryStore(storage_root)
        self._catalog = catalog
        self._max_slots = max_slots
        self._kept: SharedCache[AskedVersions] = SharedCache(capacity_bytes, bytes_of)

    async def manifest(self, key: MemoryKey) -> Manifest:
        """What storage has of the version, or the Catalog where storage has lost it.

        Raises `MemoryNotFound` where the version is deleted, or what reading it raised where it is an old one.
        """
        return (await self.of([key])).manifests[0]

    async def of(self, keys: Sequence[MemoryKey]) -> AskedVersions:
        """Raises as `manifest`."""
        return await self._kept.get(tuple(keys), partial(self._make, tuple(keys)))

    async def _make(self, keys: tuple[MemoryKey, ...]) -> AskedVersions:
        read = self._read if len(keys) == 1 else self.manifest
        return AskedVersions(tuple(await asyncio.gather(*map(read, keys))), self._max_slots)

    async def _read(self, key: MemoryKey) -> Manifest:
        try:
            return await asyncio.to_thread(self._store.read_manifest, key)
        except (DamagedFile, MemoryNotFound, OSError) as unread:
            try:
                manifest: Manifest = await self._catalog.restore_manifest.remote(key)
            except Exception as error:
                raise (unread if isinstance(cause_of(error), MemoryNotFound) else error) from error
            return manifest


def index_of(manifests: Sequence[Manifest]) -> Index:
    """The passages of these versions, under a name made of theirs: the Retriever knows it while it has them open."""
    parts = (
        IndexPart(manifest.memory, document.id, document.passages)
        for manifest in manifests
        for document in manifest.documents
    )
    return Index(tuple(parts), "+".join(f"{m.tenant}/{m.memory}/{m.version}" for m in manifests))


def require_same_model(manifest: Manifest, model: MemorizerDescription, name: str | None = None) -> None:
    """Raises `WrongModel` where another model, or another recipe of the kind, made the memory; `name` is its own."""
    running = fingerprint_of(manifest.kind, model.fingerprint)
    if manifest.fingerprint != running:
        raise WrongModel(name or manifest.memory, manifest.fingerprint, running)


def bytes_of(asked: AskedVersions) -> int:
    """What these take of RAM, about."""
    documents = [document for manifest in asked.manifests for document in manifest.documents]
    return sum(_DOCUMENT_BYTES + _FILE_BYTES * len(document.files) for document in documents)
