"""Memories as files and manifests, without a model: what the serving room's own parts are tested with."""

from collections.abc import Sequence

from cluster.storage.durable import Storage, StoredFile
from memory_worker.manifest import Document, DocumentEntry, JobRecord, Manifest, MemoryKey, MemoryShape, SegmentEntry
from memory_worker.messages import Job
from memory_worker.storage.store import head_path, passages_path, segment_path, source_path

KEY = MemoryKey("acme", "book", "v000001-00000001")
SHAPE = MemoryShape(layers=1, kv_heads=1, head_dim=2, dtype="float32")


def memory(
    storage: Storage,
    key: MemoryKey = KEY,
    documents: Sequence[str] = ("a", "b"),
) -> Manifest:
    """A version whose files are in `storage`; what they hold is of no kind that a worker reads."""

    def kept(path: str, text: str) -> StoredFile:
        return storage.write(path, text.encode())

    def document(id: str) -> DocumentEntry:
        parts = tuple(kept(segment_path(key, id, 0, window), f"slots {window} of {id}") for window in (0, 64))
        text = f"the text of {id}"
        return DocumentEntry(
            id=id,
            characters=len(text),
            source=kept(source_path(key, id), text),
            segments=(SegmentEntry(tokens=8, slots=2, files=parts),),
            passages=kept(passages_path(key, id), f"passages of {id}"),
            passage_count=1,
        )

    return Manifest(
        tenant=key.tenant,
        memory=key.memory,
        version=key.version,
        created="2026-01-01T00:00:00.000+00:00",
        title="Book",
        tags=("tall",),
        model="embedded",
        fingerprint="f" * 64,
        ratio=4,
        language="en",
        shape=SHAPE,
        head_tokens=(1, 2, 3),
        head=kept(head_path(key), "the head"),
        documents=tuple(document(id) for id in documents),
    )


def job(key: MemoryKey, base: Manifest | None = None, documents: Sequence[str] = ("a",), **fields) -> Job:
    """A job of `key`, as the catalog gives it."""
    entries = tuple(
        Document(id=id, characters=10, source=StoredFile(path=source_path(key, id), size=10, digest="0" * 64))
        for id in documents
    )
    kind = "put" if base else "create"
    record = JobRecord(kind=kind, base=base.version if base else None, documents=entries, ratio=4, language="en")
    return Job(key, record.model_copy(update=fields))
