"""Every failure as an RFC 9457 problem: which status, and a detail that says what to do. And this room's own errors.

`problem_for` is the one place where an error becomes what a client sees of it. Light to import: the command line and
the clients know these classes, too.
"""

import http
import math
from dataclasses import field
from typing import Any

from cluster.errors import ExpectedError, MessageError, cause_of
from cluster.storage.durable import DamagedFile

RETRY_AFTER_S = 5


class UnsupportedDocument(MessageError, ValueError):
    """This file cannot become text; the message says why and what to do."""

    status = 422


class NotUtf8(UnsupportedDocument):
    """A text file that is not UTF-8."""


class NoText(UnsupportedDocument):
    """A file that holds no text: empty, only white space, or pictures of pages."""


class ConversionFailed(UnsupportedDocument):
    """A file whose conversion took too much time or memory, gave too much text, or ended the converter."""


class ProblemError(ExpectedError):
    """What a client is told: one that arises where its status is known, or what `problem_for` made of another."""

    status: int = field()  # without this, the base's would be its default
    detail: str
    members: dict[str, Any] = field(default_factory=dict)  # of the problem document beside the standard ones
    template = "{detail}"

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


def problem_for(error: BaseException) -> ProblemError:
    """The problem that `error`, perhaps wrapped by Ray, is to a client. A bug's words are for the log alone."""
    cause = cause_of(error)
    if isinstance(cause, ProblemError):
        return cause
    if isinstance(cause, ExpectedError):
        return ProblemError(cause.status, str(cause))
    if is_unavailable(cause):
        return ProblemError(503, f"a part of the server is not available just now ({type(cause).__name__}); try again")
    return ProblemError(500, f"the server failed at this request ({type(cause).__name__}); its log says more")


def is_callers_fault(error: BaseException) -> bool:
    """Whether the request itself is what is wrong."""
    return problem_for(error).status < 500


def is_unavailable(error: BaseException) -> bool:
    """Whether a process that died or is not there yet is to blame: the same call may succeed with its successor."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    cause = cause_of(error)
    if isinstance(cause, ExpectedError):
        return cause.passing
    return isinstance(cause, RayActorError | DeploymentUnavailableError | BackPressureError | TimeoutError)


def damaged_path(error: BaseException) -> str | None:
    """The stored file that is damaged, if that is what the error says."""
    cause = cause_of(error)
    return cause.path if isinstance(cause, DamagedFile) else None
