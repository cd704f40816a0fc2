"""What the client raises, and reading it out of responses."""

from collections.abc import Mapping
from typing import Any

import httpx


class MemoRAGError(Exception):
    """The server refused or failed; `status` is its HTTP status, 0 where there was no answer at all."""

    def __init__(
        self, detail: str, *, title: str = "", status: int = 0, problem: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.title = title
        self.status = status
        self.problem = dict(problem or {})  # the whole problem+json, for instance the passages already found


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
