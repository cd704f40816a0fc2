"""ASGI middleware that refuses request bodies beyond a size, before and while they arrive."""

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ProblemError
from serving.http.problems import problem_response


class BodyLimit:
    """Answers 413 when `Content-Length` says too much, or more has arrived than may.

    That is `json_bytes` of what is held in memory, and `upload_bytes` of what goes to disk: all but JSON, on the two
    routes that take files.
    """

    def __init__(self, app: ASGIApp, json_bytes: int, upload_bytes: int) -> None:
        self._app = app
        self._json = json_bytes
        self._upload = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._upload if _is_upload(scope, headers.get("content-type", "")) else self._json
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            await _refuse(limit)(scope, receive, send)
            return
        received, started, refused = 0, False, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started, refused
            if not started and received > limit:  # who read the body made another refusal of `_TooLarge`
                started = refused = True
                await _refuse(limit)(scope, receive, send)
            started = True
            if not refused:
                await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooLarge:
            if started:
                raise
            await _refuse(limit)(scope, receive, send)


def _refuse(limit: int) -> Response:
    detail = f"the request is larger than {limit:,} bytes; send less, or raise limits.body_bytes for JSON, "
    return problem_response(ProblemError(413, f"{detail}limits.upload_bytes for files"))


def _is_upload(scope: Scope, kind: str) -> bool:
    takes_files = scope["method"] == "PUT" or scope["path"] == "/v1/memories"
    return takes_files and bool(kind) and "json" not in kind.partition(";")[0].lower()


class _TooLarge(Exception):
    pass
