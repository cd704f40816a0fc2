"""Small memories in a store, for the tests of whatever reads them."""

from collections.abc import Mapping

import torch

from memory_worker.manifest import DocumentEntry, FileEntry, Manifest, MemoryShape, now
from memory_worker.messages import MemoryKey
from memory_worker.store import MemoryStore, head_path, segment_path

SHAPE = MemoryShape(layers=3, kv_heads=2, head_dim=8, dtype="bfloat16")
HEAD_SLOTS = 5
WINDOW_SLOTS = 16


def random_slots(shape: MemoryShape, slots: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[layers, kv_heads, slots, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, shape.layers, shape.kv_heads, slots, shape.head_dim)
    keys, values = torch.randn(size, generator=generator).to(getattr(torch, shape.dtype))
    return keys, values


def write_segment(store: MemoryStore, path: str, slots: int, seed: int, shape: MemoryShape = SHAPE) -> FileEntry:
    with store.write_segment(path, shape) as segment:
        segment.append(*random_slots(shape, slots, seed), window_slots=WINDOW_SLOTS)
    return segment.entry


def store_memory(
    store: MemoryStore,
    key: MemoryKey,
    documents: Mapping[str, tuple[int, int]],
    shape: MemoryShape = SHAPE,
    publish: bool = True,
) -> Manifest:
    """A whole version with random slots; `documents` gives the slots and the seed of each."""
    entries = tuple(
        DocumentEntry(
            id=name,
            characters=4,
            tokens=slots * 4,
            slots=slots,
            source=store.write_source(key, name, "text"),
            segment=write_segment(store, segment_path(key, name), slots, seed, shape),
        )
        for name, (slots, seed) in documents.items()
    )
    manifest = Manifest(
        tenant=key.tenant,
        memory=key.memory,
        version=key.version,
        created=now(),
        model="tiny",
        fingerprint="f" * 64,
        ratio=4,
        language="en",
        shape=shape,
        head_tokens=tuple(range(HEAD_SLOTS)),
        head=write_segment(store, head_path(key), HEAD_SLOTS, 0, shape),
        documents=entries,
        passages=FileEntry.of(store.storage.write(f"{key.path}/passages.parquet", b"passages")),
        passage_count=1,
        index=(FileEntry.of(store.storage.write(f"{key.path}/index/flat.faiss", b"index")),),
    )
    if publish:
        store.publish(manifest)
    return manifest
