"""What is reported has few label values, and reporting never fails a request."""

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from serving.api import Answer, ClueOut, Timings, Usage
from serving.router.usage_metrics import UNKNOWN, CountedRequests, UsageMetrics, route_of

NAMES = (
    "_requests", "_question_seconds", "_stage_seconds", "_clues", "_degraded", "_memorized_tokens", "_answer_tokens",
)  # fmt: skip


def answer(tokens: int) -> Answer:
    clues = [ClueOut(kind=kind, text="x") for kind in ("span", "span", "draft")]
    return Answer(
        memory="m",
        version="v",
        memories=[],
        task="memorag",
        answer="",
        citations=[],
        evidence=[],
        clues=clues,
        passages=[],
        degraded=["embedded-model"],
        usage=Usage(completion_tokens=tokens),
        timings_ms=Timings(recall=750, generate=500, total=1500),
    )


def test_requests_are_counted_by_tenant_route_and_status(monkeypatch: pytest.MonkeyPatch) -> None:
    app, seen = FastAPI(), []
    app.add_middleware(CountedRequests)
    monkeypatch.setattr(
        UsageMetrics, "count_request", lambda _, tenant, scope, status: seen.append((tenant, route_of(scope), status))
    )

    @app.get("/v1/memories/{memory}")
    async def get_memory(request: Request, memory: str) -> str:
        request.state.tenant = memory.upper()
        return memory

    client = TestClient(app)
    for path in ("/v1/memories/a", "/v1/memories/b", "/no/such/route"):
        client.get(path)
    route = "GET /v1/memories/{memory}"
    assert seen == [("A", route, 200), ("B", route, 200), (None, UNKNOWN, 404)]


def test_reporting_without_ray_is_dropped() -> None:
    for metrics in (UsageMetrics(), UsageMetrics()):
        metrics.count_request(None, {"method": "GET"}, 401)
        metrics.count_question("a", answer(0))
        metrics.count_memorized("a", 0)
        metrics.count_memorized("a", 10)


def test_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, seen = UsageMetrics(), []
    for name in NAMES:
        monkeypatch.setattr(
            getattr(metrics, name), "_record", lambda value, tags, name=name: seen.append((value, tags))
        )
    metrics.count_request("a", {"method": "GET"}, 200)
    metrics.count_question("a", answer(7))
    metrics.count_memorized("b", 9)
    assert seen == [
        (1.0, {"tenant": "a", "route": UNKNOWN, "status": "200"}),
        (1.5, {"tenant": "a", "task": "memorag"}),
        (0.75, {"tenant": "a", "stage": "recall"}),
        (0.5, {"tenant": "a", "stage": "generate"}),
        (2, {"tenant": "a", "kind": "span"}),
        (1, {"tenant": "a", "kind": "draft"}),
        (1.0, {"tenant": "a", "lacking": "embedded-model"}),
        (7, {"tenant": "a"}),
        (9, {"tenant": "b"}),
    ]
