"""One batch run: a detached actor that asks the Routers and records what they say. `serving.batch.answer` starts it.

It belongs to no client: a client that is killed takes nothing with it. Killed itself, Ray starts it again, and it goes
on with what its folder lacks. Answers that were in flight are not lost with it either: the Routers bring them to an
end and keep them (`serving.router.once`), and the new process collects them before it asks anything.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle
from tenacity import AsyncRetrying

from cluster.errors import cause_of
from serving import api
from serving.batch.answers import Answers, make_answer_row, make_failure_row
from serving.batch.job import BatchError, BatchJob, BatchReport, until_ready
from serving.batch.questions import BatchQuestion, Questions
from serving.config import APPLICATION
from serving.errors import ProblemError, problem_for

logger = logging.getLogger(__name__)

_UNWATCHED_S = 10.0  # how long a run that has ended stays after the last who asked how it went


class BatchRun:
    """The actor of one `BatchJob`. Its methods answer at once, from any thread."""

    def __init__(self, job: BatchJob) -> None:
        self._job = job
        self._report = BatchReport()
        self._began = 0.0
        self._stop = threading.Event()
        self._asked_for = time.monotonic()
        self._itself = ray.get_runtime_context().current_actor
        threading.Thread(target=self._main, name="batch-run", daemon=True).start()

    def job(self) -> BatchJob:
        return self._job

    def report(self) -> BatchReport:
        """How far the run is."""
        self._asked_for = time.monotonic()
        return self._report

    def stop(self) -> None:
        """Asks nothing more; the run ends when what is in flight is recorded."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
            self.tell(state="stopped" if self.stopping else "done")
        except Exception as error:
            cause = cause_of(error)
            if not isinstance(cause, BatchError | OSError):
                logger.exception("the batch run of %s failed", self._job.output)
            name = "" if isinstance(cause, BatchError | OSError) else f"{type(cause).__name__}: "
            self.tell(state="failed", error=f"{name}{cause}")
        while time.monotonic() - self._asked_for < _UNWATCHED_S:
            time.sleep(1.0)
        ray.kill(self._itself)

    async def _run(self) -> None:
        job = self._job
        answers = await asyncio.to_thread(Answers, job.output, job.tenant, job.rows_per_part)
        questions = await asyncio.to_thread(Questions, job.questions, job.grouped)
        router = serve.get_deployment_handle("Router", APPLICATION)
        kept = await _fetch_kept(router, answers.run)
        self._began = time.monotonic()
        self.tell(state="asking", total=questions.count, ignored=tuple(questions.ignored), parts=answers.parts)
        rows: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()  # none: no more will come
        async with asyncio.TaskGroup() as group:
            group.create_task(self._record(answers, rows))
            await _Asking(self, router, answers, kept, rows).all(questions)
            rows.put_nowait(None)
        begun = await router.broadcast("begun", answers.run).results_async(return_exceptions=True)
        self.tell(begun=sum(count for count in begun if isinstance(count, int)), parts=answers.parts)

    async def _record(self, answers: Answers, rows: asyncio.Queue[dict[str, Any] | None]) -> None:
        """Records what has come while the last was being recorded, together."""
        more = True
        while more:
            arrived = [await rows.get()]
            while not rows.empty():
                arrived.append(rows.get_nowait())
            more = None not in arrived
            if whole := [row for row in arrived if row is not None]:
                await asyncio.to_thread(answers.record, whole)
                wrong = Counter(f"{e['status']} {e['title']}" for row in whole if (e := row.get("error")))
                before = self._report
                self.tell(
                    answered=before.answered + len(whole) - wrong.total(),
                    failed=before.failed + wrong.total(),
                    errors=dict(Counter(before.errors) + wrong),
                    parts=answers.parts,
                )
        await asyncio.to_thread(answers.fold)

    def tell(self, **changed: Any) -> None:
        """Changes the report."""
        seconds = time.monotonic() - self._began if self._began else 0.0
        self._report = replace(self._report, **{"seconds": seconds} | changed)


@dataclass
class _Asking:
    """The questions of a run on their way to the Routers."""

    run: BatchRun
    router: DeploymentHandle
    answers: Answers
    kept: dict[str, api.Answer]
    rows: asyncio.Queue[dict[str, Any] | None]
    already: int = 0
    ids: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.job = self.run.job()
        self.slots = asyncio.Semaphore(self.job.concurrency)

    async def all(self, questions: Questions) -> None:
        """Asks what is not known, and returns when the last answer is there."""
        batches = iter(questions)
        async with asyncio.TaskGroup() as asking:
            while batch := await asyncio.to_thread(next, batches, None):
                for question in batch:
                    if self._is_settled(question):
                        continue
                    await self.slots.acquire()
                    if self.run.stopping:
                        return
                    asking.create_task(self._ask(question))
                self.run.tell(already=self.already)

    def _is_settled(self, question: BatchQuestion) -> bool:
        """Whether nothing is to be asked: it is recorded, or kept by a Router, or its row is wrong."""
        identity = question.memory, question.id
        if question.key in self.answers.keys:
            self.ids.add(identity)
            self.already += 1
            return True
        self.answers.keys.add(question.key)
        if identity in self.ids:
            detail = f"another question on memory {question.memory!r} has the id {question.id!r}; give each its own"
            self.rows.put_nowait(make_failure_row(question, ProblemError(422, detail)))
            return True
        self.ids.add(identity)
        if answer := self.kept.pop(question.key.hex(), None):
            self.rows.put_nowait(make_answer_row(question, answer))
            return True
        return False

    async def _ask(self, question: BatchQuestion) -> None:
        try:
            row = make_answer_row(question, await self._answer(question))
        except ProblemError as problem:
            row = make_failure_row(question, problem)
        finally:
            self.slots.release()
        self.rows.put_nowait(row)

    async def _answer(self, question: BatchQuestion) -> api.Answer:
        """Raises `ProblemError`: of the kind "not now" only when patience is over."""
        arguments = self.answers.run, question.key.hex(), self.job.tenant, [question.memory], _check(question)

        async def ask() -> api.Answer:
            try:
                answer: api.Answer = await self.router.answer_once.remote(*arguments)
            except Exception as error:  # a boundary: whatever it is becomes a row
                raise problem_for(error) from error
            return answer

        return await AsyncRetrying(**until_ready(self.job.patience_s))(ask)


def _check(question: BatchQuestion) -> api.Question:
    """Raises `ProblemError` 422 for a row that is no question."""
    for name in ("id", "memory"):
        if not getattr(question, name):
            raise ProblemError(422, f"the row has no {name}")
    fields = {name: getattr(question, name) for name in ("question", "task", "max_tokens", "language")}
    if question.task == "summarize":
        fields["question"] = question.question or "summary"  # which asks nothing: its text only helps the search
    try:
        return api.Question(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ProblemError(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


async def _fetch_kept(router: DeploymentHandle, run: str) -> dict[str, api.Answer]:
    """What the Routers have of this run that its process did not live to record, by key."""
    found = await router.broadcast("kept_answers", run).results_async(return_exceptions=True)
    return {key: answer for each in found if isinstance(each, list) for key, answer in each}
