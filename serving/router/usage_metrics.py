"""What tenants use, as Prometheus metrics of Ray (`ray_memorag_…`): the Ingress and the jobs report here.

No label is an id of a memory, document or request: tenants are as many as have keys, routes as many as there are.
Outside Ray, and in a cluster that collects no metrics, what is reported is dropped.
"""

from collections import Counter as PlainCounter
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import Answer

UNKNOWN = "unknown"  # the tenant of a request without a valid key, and the route of one that matches none

_SECONDS = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300]


class UsageMetrics:
    """The metrics of one process; several objects add up."""

    def __init__(self) -> None:
        self._requests = Counter(
            "memorag_requests", "HTTP requests that were answered, refusals included", ("tenant", "route", "status")
        )
        self._question_seconds = Histogram(
            "memorag_question_seconds", "seconds from question to last token", _SECONDS, ("tenant", "task")
        )
        self._stage_seconds = Histogram(
            "memorag_stage_seconds", "seconds of one stage of a question", _SECONDS, ("tenant", "stage")
        )
        self._clues = Counter("memorag_clues", "clues that were recalled", ("tenant", "kind"))
        self._degraded = Counter("memorag_degraded_answers", "answers that lacked something", ("tenant", "lacking"))
        self._memorized_tokens = Counter("memorag_memorized_tokens", "tokens of texts made into memories", ("tenant",))
        self._answer_tokens = Counter("memorag_answer_tokens", "tokens of answers", ("tenant",))

    def count_request(self, tenant: str | None, scope: Mapping[str, Any], status: int) -> None:
        """One HTTP request that was answered; `scope` is its ASGI scope."""
        self._requests.inc(tags={"tenant": tenant or UNKNOWN, "route": route_of(scope), "status": str(status)})

    def count_question(self, tenant: str, answer: Answer) -> None:
        """One question that was answered to its end."""
        timings = answer.timings_ms
        self._question_seconds.observe(timings.total / 1000, tags={"tenant": tenant, "task": answer.task})
        for stage in ("recall", "retrieve", "generate"):
            if milliseconds := getattr(timings, stage):
                self._stage_seconds.observe(milliseconds / 1000, tags={"tenant": tenant, "stage": stage})
        for kind, number in PlainCounter(clue.kind for clue in answer.clues).items():
            self._clues.inc(number, tags={"tenant": tenant, "kind": kind})
        for lacking in answer.degraded:
            self._degraded.inc(tags={"tenant": tenant, "lacking": lacking})
        _add(self._answer_tokens, answer.usage.completion_tokens, tenant)

    def count_memorized(self, tenant: str, tokens: int) -> None:
        """One job that is done."""
        _add(self._memorized_tokens, tokens, tenant)


class CountedRequests:
    """ASGI middleware that counts requests as they are answered. `request.state.tenant` says whose they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._metrics = UsageMetrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_request(scope.get("state", {}).get("tenant"), scope, message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def route_of(scope: Mapping[str, Any]) -> str:
    """The method and path template of the route that took a request: `GET /v1/memories/{memory}`."""
    route = scope.get("route")
    path = getattr(route, "path_format", None)
    return f"{scope['method']} {path}" if path else UNKNOWN


def _add(counter: Counter, value: int, tenant: str) -> None:
    if value > 0:  # Ray refuses to add nothing
        counter.inc(value, tags={"tenant": tenant})
