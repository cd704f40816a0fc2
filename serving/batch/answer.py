"""Many questions at once, on the cluster: `answer_all`, and what `memorag batch` does.

from serving.batch import answer_all
answer_all("questions.parquet", "answers/", concurrency=256)  # resumes where it stopped

The run is an actor of its own on the cluster (`serving.batch.run`); the caller starts it, or finds it running, and
watches. Nothing here imports Ray before it is needed: Ray reads how to authenticate when it is imported.
"""

import hashlib
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.batch.job import BatchError, BatchJob, BatchReport, locate
from serving.batch.progress import OnCount, counting
from serving.deploy.attach import NotAttached, attached

if TYPE_CHECKING:
    import pyarrow as pa

_NAMESPACE = "memorag-batch"
_POLL_S = 0.5
_SILENT_S = 120.0  # longer than an actor takes to be started again on a busy machine


def answer_all(
    questions: "str | Path | pa.Table",
    output: str | Path,
    *,
    concurrency: int = 64,
    tenant: str = "default",
    group_by_memory: bool = True,
    rows_per_part: int = 1000,
    patience_s: float = 300.0,
    retry_failed: bool = False,
    storage: str | Path | None = None,
    ray_address: str | None = None,
    progress: bool | OnCount | None = None,
) -> BatchReport:
    """Answers every row of `questions` once, and writes the answers as Parquet files to the folder `output`.

    `questions` is a file or folder of Parquet or JSON Lines, a URI of such, or an Arrow table: columns id, memory,
    question, and where wanted task, max_tokens, language. A row that is recorded in `output` is not asked again,
    whatever ended the run before. At most `concurrency` questions are in flight. A question that cannot be answered
    becomes a row whose `error` says why: at once, or after `patience_s` seconds if the server only said "not now".
    `retry_failed` asks again what has an error in `output`.

    The run goes on if this process is killed; called again, this watches it. An interrupt (Ctrl-C) ends the run once
    what is in flight is recorded.

    The cluster is the one Ray is connected to already, the one at `ray_address`, or that of the server which owns the
    folder `storage` (default `$MEMORAG_STORAGE`, else ~/.memorag). `progress` as for `MemoRAG.memorize`. Raises
    `BatchError`.
    """
    if min(concurrency, rows_per_part) < 1:
        raise ValueError("concurrency and rows_per_part are at least 1")
    target = locate(output)
    from serving.batch.questions import questions_of

    job = BatchJob(
        questions_of(questions, target),
        target,
        tenant,
        concurrency,
        group_by_memory,
        rows_per_part,
        patience_s,
        uuid.uuid4().hex,
    )
    try:
        with attached(storage, ray_address), counting("asking", "questions", progress) as show:
            return _watch(_run_of(job, retry_failed), show)
    except NotAttached as error:
        raise BatchError(str(error)) from None


def _run_of(job: BatchJob, retry_failed: bool) -> Any:
    """The run of the job's output folder: the one that is under way, or a new one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.actors import lasting_actor
    from serving.batch.answers import Answers
    from serving.batch.run import BatchRun

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft="://" in job.output)
    name = f"batch-{hashlib.sha256(job.output.encode()).hexdigest()[:16]}"
    while True:
        try:
            actor = ray.get_actor(name, _NAMESPACE)
        except ValueError:
            if retry_failed:
                Answers(job.output, job.tenant, job.rows_per_part).drop_failed()
            # On this node, where the folders are.
            lasting = lasting_actor(BatchRun, name, _NAMESPACE, max_concurrency=8, scheduling_strategy=here)
            actor = lasting.remote(job)
        try:
            running: BatchJob = ray.get(actor.job.remote())
            if running.caller != job.caller and ray.get(actor.report.remote()).ended:
                ray.kill(actor)  # the run before, which waits for others to ask how it went
                continue
        except ray.exceptions.RayActorError:
            time.sleep(_POLL_S)  # until its name is free
            continue
        if (running.questions, running.tenant) != (job.questions, job.tenant):
            raise BatchError(
                f"a run of {running.questions} for tenant {running.tenant!r} is writing to {job.output}; "
                "wait until it is done, or choose another folder"
            )
        return actor


def _watch(actor: Any, show: OnCount) -> BatchReport:
    """The run's last report; ends the run in good order where it is interrupted."""
    import ray

    stopping = False
    while True:
        try:
            report: BatchReport = ray.get(actor.report.remote(), timeout=_SILENT_S)
            show(report.already + report.answered + report.failed, report.total, report.already)
            if report.ended:
                break
            time.sleep(_POLL_S)
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping = True
            actor.stop.remote()
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            raise BatchError(
                f"the run does not answer ({type(error).__name__}); what it recorded stays. When the server is well, "
                "give the same command again"
            ) from None
    if report.error:
        raise BatchError(report.error)
    return report
