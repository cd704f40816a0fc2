"""What the Router reads out of a manifest: the index the Retriever searches, and the memory as HTTP shows it."""

from memory_worker.manifest import Manifest
from memory_worker.messages import MemoryRecord
from retrieval_worker.messages import Index
from serving import api


def index_of(manifest: Manifest) -> Index:
    """The Retriever's name for this version's index."""
    return Index(
        passages=manifest.passages.stored,
        files=tuple(entry.stored for entry in manifest.index),
        passage_count=manifest.passage_count,
    )


def memory_out(record: MemoryRecord) -> api.MemoryOut:
    """The memory as HTTP shows it: from its manifest when it is ready, from its job until then."""
    manifest, job = record.manifest, record.job
    if manifest is not None:
        return api.MemoryOut(
            id=manifest.memory,
            title=manifest.title,
            status=record.status,
            version=manifest.version,
            kind=manifest.kind,
            ratio=manifest.ratio,
            slots=manifest.slots,
            tokens=manifest.tokens,
            passages=manifest.passage_count,
            bytes=manifest.bytes,
            documents=[api.DocumentOut(id=d.id, characters=d.characters, tokens=d.tokens) for d in manifest.documents],
            created=manifest.created,
            error=record.error,
        )
    return api.MemoryOut(
        id=record.memory,
        title=job.title if job else None,
        status=record.status,
        version=record.version,
        kind="beacon",
        ratio=job.ratio if job else 0,
        slots=0,
        tokens=record.total_tokens,
        passages=0,
        bytes=0,
        documents=[api.DocumentOut(id=d.id, characters=d.characters, tokens=0) for d in (job.documents if job else ())],
        created=record.created,
        error=record.error,
    )
