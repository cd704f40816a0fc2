"""Failures on OpenAI's routes, in OpenAI's shape: https://platform.openai.com/docs/guides/error-codes."""

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ROUTES = ("/v1/models", "/v1/chat/")
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class OpenAIErrors:
    """ASGI middleware that writes the problems of these routes as OpenAI's clients read them, whoever made them.

    422, which OpenAI does not use, becomes 400.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_ROUTES):
            await self._app(scope, receive, send)
            return
        start: Message | None = None  # of a problem whose body has not come yet
        body = b""

        async def written(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                if Headers(scope=message).get("content-type", "").startswith("application/problem+json"):
                    start = message
                    return
            elif start is not None:
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                problem = json.loads(body)
                sent = json.dumps(error_body(problem["status"], problem)).encode()
                start["status"] = 400 if problem["status"] == 422 else problem["status"]
                headers = MutableHeaders(scope=start)
                headers["content-type"], headers["content-length"] = "application/json", str(len(sent))
                await send(start)
                message = {"type": "http.response.body", "body": sent}
            await send(message)

        await self._app(scope, receive, written)


def error_body(status: int, problem: dict[str, Any]) -> dict[str, Any]:
    """An RFC 9457 problem as OpenAI's error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    told = {"message": problem["detail"], "type": kind, "param": problem.get("param"), "code": problem.get("code")}
    return {"error": told}
