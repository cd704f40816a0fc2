"""Small memories in a store, for the tests of whatever reads them."""

import os
import resource
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.storage.durable import StoredFile
from memory_worker.manifest import DocumentEntry, Manifest, MemoryKey, MemoryShape, SegmentEntry, now
from memory_worker.messages import SegmentGroup
from memory_worker.recall.groups import segment_groups
from memory_worker.storage.store import MemoryStore, head_path, passages_path, segment_path

SHAPE = MemoryShape(layers=3, kv_heads=2, head_dim=8, dtype="bfloat16")
HEAD_SLOTS = 5
WINDOW_SLOTS = 16
Seeded = tuple[int, int]  # slots, and the seed of their numbers


def random_slots(shape: MemoryShape, slots: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[layers, kv_heads, slots, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, shape.layers, shape.kv_heads, slots, shape.head_dim)
    keys, values = torch.randn(size, generator=generator).to(getattr(torch, shape.dtype))
    return keys, values


def write_segment(store: MemoryStore, path: str, slots: int, seed: int, shape: MemoryShape = SHAPE) -> StoredFile:
    return store.write_segment(path, shape, [random_slots(shape, slots, seed)])


def store_memory(
    store: MemoryStore,
    key: MemoryKey,
    documents: Mapping[str, Seeded | Sequence[Seeded]],
    shape: MemoryShape = SHAPE,
    publish: bool = True,
    file_windows: int | None = None,
    fingerprint: str = "f" * 64,
) -> Manifest:
    """A whole version with random slots: each document of one segment, or of several.

    Segments are cut into files of `file_windows`; none makes each one file.
    """
    entries = []
    for name, given in documents.items():
        seeded: Any = [given] if isinstance(given[0], int) else given
        passages = store.storage.write(passages_path(key, name), b"passages")
        entries.append(
            DocumentEntry(
                **dict(store.write_source(key, name, "text")),
                segments=tuple(
                    _stored(store, key, name, i, each, shape, file_windows) for i, each in enumerate(seeded)
                ),
                passages=passages,
                passage_count=1,
            )
        )
    manifest = Manifest(
        tenant=key.tenant,
        memory=key.memory,
        version=key.version,
        created=now(),
        model="tiny",
        fingerprint=fingerprint,
        ratio=4,
        language="en",
        shape=shape,
        head_tokens=tuple(range(HEAD_SLOTS)),
        head=write_segment(store, head_path(key), HEAD_SLOTS, 0, shape),
        documents=tuple(entries),
    )
    if publish:
        store.publish(manifest)
    return manifest


def whole(*manifests: Manifest) -> SegmentGroup:
    """All segments of these versions, read together."""
    (group,) = segment_groups(manifests, 2**40)
    return group


def _stored(
    store: MemoryStore,
    key: MemoryKey,
    document: str,
    index: int,
    seeded: Seeded,
    shape: MemoryShape,
    file_windows: int | None,
) -> SegmentEntry:
    slots, seed = seeded
    keys, values = random_slots(shape, slots, seed)
    step = file_windows * WINDOW_SLOTS if file_windows else slots
    files = []
    for start in range(0, slots, step):
        path, part = segment_path(key, document, index, start // WINDOW_SLOTS), slice(start, start + step)
        files.append(store.write_segment(path, shape, [(keys[:, :, part], values[:, :, part])]))
    return SegmentEntry(tokens=slots * 4, slots=slots, files=tuple(files))


def in_little_memory(work: Callable[[], None]) -> bool:
    """Whether `work` ends without an exception in a child of this process, which may take 256 MiB more than it has."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (has + (256 << 20),) * 2)
            work()
            status = 0
        except BaseException:  # noqa: BLE001  (the child must not go on as a second test run)
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0
