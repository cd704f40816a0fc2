"""What Serve's HTTP proxy answers when a replica dies under a request: a problem that can be retried, not a bare 500.

The proxy loads `middlewares` because `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it (`deploy.local_ray` sets
that, the container images of a cluster do). Other applications on the same Serve answer as they do without it.
"""

import json
import logging

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import APPLICATION
from serving.errors import ProblemError
from serving.http.openai_errors import OpenAIErrors
from serving.http.problems import problem_response

logger = logging.getLogger("ray.serve")

_OF_THE_PROXY = (404, 408, 429, 500, 503)
_ROUTES = "/-/routes"  # where the proxy says which application has which prefix


def middlewares() -> list[Middleware]:
    """For Serve."""
    return [Middleware(RetryableFailures)]


class RetryableFailures:
    """Sends 503 with `Retry-After` where the proxy answers for a replica of ours that died or is not there.

    The Ingress answers failures of its own in JSON; whatever else comes with an error's status on its routes is
    the proxy's, which sends nothing at all for a replica that died, and 404 until it has heard of the Ingress: a server
    that is starting must not say of a memory that there is none. A response that has begun cannot be replaced: it
    breaks off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._applications: dict[str, str] = {}  # by prefix, as the proxy last named them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        asked = dict(scope)  # the proxy changes what it is given
        started = replaced = False

        async def watched(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                if message["status"] in _OF_THE_PROXY and b"json" not in kind and await self._is_ours(asked):
                    replaced = True
                    await _answer(asked, receive, send)
            if not replaced:  # else this is the body that went with it
                await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:  # a boundary: of whatever goes wrong here, the client learns that it may try again
            if started or not await self._is_ours(asked):
                raise
            logger.exception("a request was lost on its way to the Ingress")
        if not started and await self._is_ours(asked):
            await _answer(asked, receive, send)

    async def _is_ours(self, scope: Scope) -> bool:
        """Whether the request is for our application; by its path alone, where the proxy has not heard of that."""
        body, path = bytearray(), scope["path"]

        async def take(message: Message) -> None:
            body.extend(message.get("body", b""))

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        about = {"method": "GET", "path": _ROUTES, "raw_path": _ROUTES.encode(), "query_string": b"", "root_path": ""}
        try:
            await self._app({**scope, **about}, nothing, take)
            routes = json.loads(body)
            self._applications = routes if isinstance(routes, dict) else self._applications
        except Exception as error:  # noqa: BLE001  a proxy that starts or drains says so in words: what it said before holds
            logger.info("the proxy does not name its routes: %r", error)
        prefixes = [p for p in self._applications if p == "/" or path == p or path.startswith(f"{p}/")]
        if prefixes:
            return self._applications[max(prefixes, key=len)] == APPLICATION
        unknown = APPLICATION not in self._applications.values()
        return unknown and (path in ("/", "/healthz", "/readyz") or path.startswith("/v1/"))


# As the Ingress would: in OpenAI's shape on its routes.
_answer = OpenAIErrors(
    problem_response(
        ProblemError(503, "the part of the server that works on this request is not there just now; try again")
    )
)
