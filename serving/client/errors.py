"""What the client raises, and reading it out of responses."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import httpx

from cluster.errors import ExpectedError


class MemoRAGError(ExpectedError):
    """The server refused or failed; `status` is its HTTP status, 0 where there was no answer at all."""

    detail: str
    title: str = ""
    status: int = 0
    problem: Mapping[str, Any] = field(default_factory=dict)  # the whole problem+json, as with the passages found
    template = "{detail}"


class ServerUnreachable(MemoRAGError):
    """Nothing answers at the address, or it stopped in the middle."""


def check(response: httpx.Response) -> httpx.Response:
    """`response`, unless it is an error: then `MemoRAGError` with what its problem document says."""
    if not response.is_error:
        return response
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": response.text[:200] or response.reason_phrase}
    raise problem_error({"status": response.status_code, "title": response.reason_phrase, **problem})


def problem_error(problem: dict[str, Any]) -> MemoRAGError:
    title, status = str(problem.get("title", "")), int(problem.get("status", 0))
    return MemoRAGError(str(problem.get("detail") or title), title=title, status=status, problem=problem)
