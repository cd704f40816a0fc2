"""What Serve's HTTP proxy answers when a replica dies under a request: a problem that can be retried, not a bare 500.

The proxy loads `middlewares` because `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it (`deploy.local_ray` sets
that, the container images of a cluster do).
"""

import logging

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ProblemError

logger = logging.getLogger("ray.serve")

_OF_THE_PROXY = (404, 408, 429, 500, 503)


def middlewares() -> list[Middleware]:
    """For Serve."""
    return [Middleware(RetryableFailures)]


class RetryableFailures:
    """Sends 503 with `Retry-After` where the proxy answers for a replica that died or is not there, or sends nothing.

    The Ingress answers failures of its own as problems; whatever else comes with an error's status is the proxy's,
    which sends nothing at all for a replica that died, and 404 until it has heard of the Ingress: a server that is
    starting must not say of a memory that there is none. A response that has begun cannot be replaced: it breaks off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = replaced = False

        async def watched(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                if message["status"] in _OF_THE_PROXY and b"problem+json" not in kind:
                    replaced = True
                    await _send_problem(send)
            elif replaced:
                return  # the body that went with it
            if not replaced:
                await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:  # a boundary: of whatever goes wrong here, the client learns that it may try again
            if started:
                raise
            logger.exception("a request was lost on its way to the Ingress")
        if not started:
            await _send_problem(send)


async def _send_problem(send: Send) -> None:
    problem = ProblemError(503, "the part of the server that works on this request is not there just now; try again")
    body = problem.json_bytes()
    headers = {"content-type": "application/problem+json", "content-length": str(len(body)), **problem.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
