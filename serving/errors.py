"""Every failure as an RFC 9457 problem: which status, which title, and a detail that says what to do."""

import asyncio
import http
import json
import math
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.errors import EngineFailed
from cluster.storage.durable import DamagedFile, StorageFull, StorageGone
from generator_worker import errors as generator_errors
from memory_worker import errors as memory_errors
from retrieval_worker import errors as retrieval_errors
from serving.documents.convert import UnsupportedDocument

RETRY_AFTER_S = 5
_UNAVAILABLE = (
    RayActorError,
    DeploymentUnavailableError,
    BackPressureError,
    asyncio.TimeoutError,
    TimeoutError,
)

# The first class that matches gives the status. 422: the request is understood and cannot be done as it is.
_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (memory_errors.InvalidId, 422),
    (memory_errors.MemoryNotFound, 404),
    (memory_errors.MemoryExists, 409),
    (memory_errors.MemoryNotReady, 409),
    (memory_errors.WrongModel, 409),
    (memory_errors.DocumentNotFound, 404),
    (memory_errors.NoJob, 409),
    (memory_errors.LastDocument, 409),
    (memory_errors.VersionChanged, 412),
    (memory_errors.JobUnderWay, 412),
    (memory_errors.QueueFull, 429),
    (memory_errors.QuotaExceeded, 429),
    (memory_errors.QuestionTooLong, 422),
    (memory_errors.MemoryTooLarge, 422),
    (memory_errors.WindowTooLarge, 422),
    (memory_errors.MixedMemories, 422),
    (memory_errors.UnsupportedKind, 422),
    (memory_errors.UnfitRatio, 422),
    (memory_errors.EmptyDocument, 422),
    (generator_errors.QuestionTooLong, 422),
    (UnsupportedDocument, 422),
    (generator_errors.GenerationFailed, 503),
    (EngineFailed, 503),
    (memory_errors.LostRank, 503),
    (StorageFull, 507),
    (StorageGone, 503),
    (retrieval_errors.DamagedIndex, 500),
    (DamagedFile, 500),
)


class ProblemError(Exception):
    """A failure on its way to the client; crosses processes."""

    def __init__(self, status: int, detail: str, members: dict[str, Any] | None = None) -> None:
        super().__init__(status, detail, members)
        self.status = status
        self.detail = detail
        self.members = members or {}

    def __str__(self) -> str:
        return self.detail

    def with_members(self, **members: Any) -> "ProblemError":
        """The same problem with extension members, such as the passages that were found."""
        return ProblemError(self.status, self.detail, {**self.members, **members})

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in (429, 503):
            return {"Retry-After": str(math.ceil(self.members.get("retry_after", RETRY_AFTER_S)))}
        return {}

    def body(self) -> dict[str, Any]:
        """The `application/problem+json` document."""
        return {
            "type": "about:blank",
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }

    def json_bytes(self) -> bytes:
        """`body` as it is sent."""
        return json.dumps(self.body(), ensure_ascii=False).encode()


def problem_for(error: BaseException) -> ProblemError:
    """The problem that `error`, perhaps wrapped by Ray, is to a client."""
    cause = cause_of(error)
    if isinstance(cause, ProblemError):
        return cause
    for kind, status in _STATUS:
        if isinstance(cause, kind):
            return ProblemError(status, str(cause))
    if isinstance(cause, _UNAVAILABLE):
        return ProblemError(503, f"a part of the server is not available just now ({type(cause).__name__}); try again")
    return ProblemError(500, f"the server failed at this request ({type(cause).__name__}); its log says more")


def is_callers_fault(error: BaseException) -> bool:
    """Whether the request itself is what is wrong."""
    return problem_for(error).status < 500


def is_unavailable(error: BaseException) -> bool:
    """Whether a process that died or is not there yet is to blame: the same call may succeed with its successor."""
    cause = cause_of(error)
    return isinstance(cause, (*_UNAVAILABLE, EngineFailed, memory_errors.LostRank))


def damaged_path(error: BaseException) -> str | None:
    """The stored file that is damaged, if that is what the error says."""
    cause = cause_of(error)
    return cause.path if isinstance(cause, DamagedFile | retrieval_errors.DamagedIndex) else None


def cause_of(error: BaseException) -> BaseException:
    """What was raised, without the wrappings of Ray and of task groups."""
    while True:
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
        elif isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            return error
