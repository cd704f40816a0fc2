"""Memories, jobs and what the pipeline found, in the shapes of `serving.api`: what HTTP shows of them."""

from dataclasses import asdict

from cluster.messages import TextDelta
from memory_worker.manifest import Manifest
from memory_worker.messages import Clue, Job, MemoryRecord
from retrieval_worker.messages import Hit
from serving import api


def memory_out(record: MemoryRecord, manifest: Manifest | None) -> api.MemoryOut:
    """The memory: from its version's manifest when it is ready, from its job until then."""
    job, failed = record.job, record.failed_change
    if manifest is not None:
        return api.MemoryOut(
            id=manifest.memory,
            title=manifest.title,
            tags=list(manifest.tags),
            status=record.status,
            version=manifest.version,
            kind=manifest.kind,
            ratio=manifest.ratio,
            slots=manifest.slots,
            tokens=manifest.tokens,
            passages=manifest.passage_count,
            bytes=manifest.bytes,
            dropped=manifest.dropped,
            head_budgets=manifest.head_budgets,
            documents=[api.DocumentOut(id=d.id, characters=d.characters, tokens=d.tokens) for d in manifest.documents],
            created=manifest.created,
            job=_job_out(job),
            failed_change=api.FailedChange(kind=failed.kind, version=failed.key.version, error=failed.error)
            if failed
            else None,
        )
    made_of = job.record if job else None
    documents = made_of.documents if made_of else ()
    return api.MemoryOut(
        id=record.memory,
        title=made_of.title if made_of else None,
        tags=list(made_of.tags) if made_of else [],
        status=record.status,
        version=record.version,
        kind=made_of.memory_kind if made_of else "beacon",
        ratio=made_of.ratio if made_of else 0,
        slots=0,
        tokens=job.total_tokens if job else 0,
        passages=0,
        bytes=0,
        documents=[api.DocumentOut(id=d.id, characters=d.characters, tokens=0) for d in documents],
        created=record.created,
        job=_job_out(job),
        error=record.error,
    )


def progress_out(status: api.Status, job: Job, rate: float) -> api.ProgressOut:
    """How far a job is, at `rate` tokens a second."""
    left = (job.total_tokens - job.done_tokens) / rate if rate > 0 and job.total_tokens else None
    return api.ProgressOut(
        status=status,
        state=job.state,
        done_tokens=job.done_tokens,
        total_tokens=job.total_tokens,
        tokens_per_second=rate,
        seconds_left=left,
    )


def clue_out(clue: Clue) -> api.ClueOut:
    return api.ClueOut(**asdict(clue))


def passage_out(hit: Hit) -> api.PassageOut:
    return api.PassageOut(**asdict(hit.passage), score=hit.score)


def citation_out(n: int, hit: Hit) -> api.CitationOut:
    """`[n]` in an answer."""
    return api.CitationOut(n=n, **asdict(hit.passage))


def event_out(item: Clue | Hit | TextDelta | api.Answer) -> api.Event:
    """What the pipeline yields, as an event of a stream."""
    if isinstance(item, Clue):
        return api.Event(name="clue", data=clue_out(item).model_dump())
    if isinstance(item, Hit):
        return api.Event(name="passage", data=passage_out(item).model_dump())
    if isinstance(item, TextDelta):
        return api.Event(name="token", data={"text": item.text})
    return api.Event(name="done", data=item.model_dump())


def _job_out(job: Job | None) -> api.JobOut | None:
    if job is None:
        return None
    return api.JobOut(
        kind=job.record.kind,
        state=job.state,
        version=job.key.version,
        documents=[document.id for document in job.record.documents],
        done_tokens=job.done_tokens,
        total_tokens=job.total_tokens,
    )
