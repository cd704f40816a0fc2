"""Failures of HTTP requests as RFC 9457 problems, whoever raised them: registered by the Ingress."""

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from starlette.exceptions import HTTPException

from cluster.errors import ExpectedError, cause_of
from serving.errors import ProblemError, problem_for

logger = logging.getLogger("ray.serve")  # as all that is logged on a replica

STATUSES = {
    400: "The request cannot be read",
    401: "No valid API key was sent",
    404: "No such memory, document or page",
    405: "The route does not take this method",
    409: "The memory is in the wrong state for this",
    412: "The memory has changed, or is being changed",
    413: "The request is larger than the server takes",
    415: "The content type is none that this route takes",
    422: "The request is readable and cannot be done as it is",
    429: "Too many requests or jobs, or a quota is used up; try again after Retry-After seconds",
    500: "The server failed, or a stored file is damaged; its log says more",
    503: "A part of the server is not available just now; try again after Retry-After seconds",
    507: "The server's storage is full",
}


def add_error_handlers(app: FastAPI) -> None:
    """Makes every failure of `app` a problem."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (ExpectedError, RayError, TimeoutError, Exception):  # the last one's is called outside all others
        app.add_exception_handler(kind, _on_failure)


def problem_response(problem: ProblemError) -> Response:
    """The problem as it is sent."""
    return JSONResponse(
        problem.body(), status_code=problem.status, headers=problem.headers, media_type="application/problem+json"
    )


async def _on_problem(request: Request, problem: ProblemError, cause: BaseException | None = None) -> Response:
    if problem.status >= 500:
        what = request.method, request.url.path, problem.status, problem.detail
        logger.error("%s %s: %d, %s", *what, exc_info=None if isinstance(cause, ExpectedError) else cause)
    return problem_response(problem)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if "json" not in (kind := request.headers.get("content-type", "")) and "body" in error.errors()[0]["loc"]:
        problem = ProblemError(415, f"content type {kind or 'missing'!r}; send application/json")
        return await _on_problem(request, problem)
    problems = [(".".join(str(part) for part in e["loc"] if part != "body"), e["msg"]) for e in error.errors()]
    detail = "; ".join(f"{where}: {what}" if where else what for where, what in problems[:5])
    status = 400 if any(e["type"] == "json_invalid" for e in error.errors()) else 422
    return await _on_problem(request, ProblemError(status, f"{detail}; see /docs for the request's shape"))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = {
        400: "the body cannot be read; send JSON in UTF-8",
        404: f"there is no {request.url.path}; GET /docs lists the routes, GET /v1/memories the memories",
        405: f"{request.url.path} does not take {request.method}; GET /docs lists the routes",
    }.get(error.status_code, error.detail)
    response = await _on_problem(request, ProblemError(error.status_code, detail))
    response.headers.update(error.headers or {})
    return response


async def _on_failure(request: Request, error: Exception) -> Response:
    return await _on_problem(request, problem_for(error), cause_of(error))
