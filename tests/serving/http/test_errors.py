"""Each failure is the right problem, whoever wrapped it on its way."""

import copy
import json
import pickle
from collections.abc import AsyncIterator
from dataclasses import fields

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from sse_starlette import ServerSentEvent

from cluster.errors import EngineFailed, ExpectedError, MessageError, cause_of
from cluster.storage.durable import DamagedFile, StorageFull, StorageGone
from generator_worker import errors as generator_errors
from memory_worker import errors as memory_errors
from memory_worker.errors import DamagedMemory, MemoryNotFound, QuotaExceeded, VersionChanged
from retrieval_worker import errors as retrieval_errors
from serving import api
from serving import errors as serving_errors
from serving.errors import ProblemError, damaged_path, is_callers_fault, is_unavailable, problem_for
from serving.http.admission import InFlight
from serving.http.event_stream import stream_events
from serving.http.problems import add_error_handlers


def wrapped(cause: Exception) -> Exception:
    """As Ray brings it from another process, through a task group."""
    return ExceptionGroup("tasks", [RayTaskError("f", "traceback", cause).as_instanceof_cause()])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (memory_errors.InvalidId("memory", ".."), 422),
        (MemoryNotFound("m"), 404),
        (memory_errors.MemoryExists("m"), 409),
        (memory_errors.MemoryNotReady("m", "memorizing"), 409),
        (memory_errors.WrongModel("m", "a" * 64, "b" * 64), 409),
        (memory_errors.DocumentNotFound("m", "d", ("a",)), 404),
        (memory_errors.NoJob("m"), 409),
        (memory_errors.LastDocument("m", "d"), 409),
        (VersionChanged("m", "v1", "v2"), 412),
        (memory_errors.JobUnderWay("m"), 412),
        (memory_errors.QueueFull(9), 429),
        (QuotaExceeded("memories", 1, 2), 429),
        (EngineFailed("it died"), 503),
        (TimeoutError(), 503),
        (TimeoutError(), 503),
        (RayActorError(), 503),
        (StorageFull("/there"), 507),
        (StorageGone("/there"), 503),
        (DamagedFile("a/b", "is missing"), 500),
        (DamagedMemory("a/b", "is no Arrow"), 500),
        (ValueError("a secret of ours"), 500),
        (ProblemError(418, "as it is"), 418),
    ],
)
def test_the_status_of_every_failure(error: Exception, status: int) -> None:
    for form in (error, wrapped(error)):
        problem = problem_for(form)
        assert problem.status == status and problem.detail
        assert ("Retry-After" in problem.headers) == (status in (429, 503))
        assert is_callers_fault(form) == (status < 500)
        assert "secret" not in problem.detail, "an unforeseen error's words are for the log"
    assert cause_of(wrapped(error)) is error


OF_JOBS = {memory_errors.JobEnded, memory_errors.LostRank}  # 500 and 503 to nobody: the memory says that it failed
ERRORS = [
    error
    for module in (memory_errors, generator_errors, retrieval_errors, serving_errors)
    for error in vars(module).values()
    if isinstance(error, type) and issubclass(error, ExpectedError) and error not in (ExpectedError, MessageError)
]


def made(error: type[ExpectedError]) -> ExpectedError:
    """One with a value of its type for every field."""
    values = {"str": "a value", "int": 7, "tuple[str, ...]": ("x", "y"), "tuple[int, ...]": (2, 4)}
    types = {field.name: getattr(field.type, "__name__", field.type) for field in fields(error)}  # type: ignore[arg-type]
    types |= {field.name: str(field.type) for field in fields(error) if "tuple" in str(field.type)}  # type: ignore[arg-type]
    return error(*(values.get(kind) for kind in types.values()))


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_crosses_processes_and_ray_with_all_its_fields(error: type[ExpectedError]) -> None:
    before = made(error)
    ours = pickle.loads(pickle.dumps(before))  # noqa: S301
    rays = cause_of(cloudpickle.loads(cloudpickle.dumps(wrapped(before))))
    for after in (ours, rays, copy.copy(before), cause_of(wrapped(before))):
        assert type(after) is error and vars(after) == vars(before) and str(after) == str(before)
        assert "{" not in str(after)


@pytest.mark.parametrize("error", [e for e in vars(memory_errors).values() if e in ERRORS and e not in OF_JOBS])
def test_no_error_of_a_memory_is_unforeseen(error: type[ExpectedError]) -> None:
    assert problem_for(made(error)).status < 500 or issubclass(error, DamagedFile)


def test_a_problem_crosses_processes_with_its_members() -> None:
    problem = pickle.loads(pickle.dumps(ProblemError(429, "slow", {"retry_after": 2.4})))  # noqa: S301
    assert (problem.status, str(problem), problem.members) == (429, "slow", {"retry_after": 2.4})
    assert problem.headers == {"Retry-After": "3"}
    assert problem.with_members(clues=[]).body() == {
        "type": "about:blank", "title": "Too Many Requests", "status": 429, "detail": "slow", "retry_after": 2.4,
        "clues": [],
    }  # fmt: skip


def test_which_file_is_damaged_and_who_may_be_asked_again() -> None:
    assert damaged_path(wrapped(DamagedFile("a/b.safetensors", "is missing"))) == "a/b.safetensors"
    assert damaged_path(wrapped(DamagedMemory("a/b.safetensors", "is no Arrow"))) == "a/b.safetensors"
    assert damaged_path(ValueError()) is None
    assert all(is_unavailable(wrapped(e)) for e in (RayActorError(), EngineFailed("x"), TimeoutError()))
    assert not any(is_unavailable(wrapped(e)) for e in (MemoryNotFound("m"), DamagedFile("a", "b"), ValueError()))
    assert problem_for(ProblemError(401, "no key")).headers == {"WWW-Authenticate": "Bearer"}


def told(error: Exception) -> httpx.Response:
    """What an application answers in which a route raises `error`."""
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/fails")
    async def fails() -> None:
        raise error

    return TestClient(app, raise_server_exceptions=False).get("/fails")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryNotFound("m"), 404),
        (StorageFull("/x"), 507),
        (RayActorError(), 503),
        (ValueError("a secret of ours"), 500),
    ],
)
def test_errors_become_problems_at_the_edge_of_http_wherever_they_were_raised(error: Exception, status: int) -> None:
    once = RayTaskError("f", "traceback", error).as_instanceof_cause()
    twice = RayTaskError("g", "traceback", once).as_instanceof_cause()  # from the Catalog through the Router
    for form in (error, once, cloudpickle.loads(cloudpickle.dumps(twice)), wrapped(error)):
        response = told(form)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.status_code == response.json()["status"] == status and "secret" not in response.text


async def test_no_client_sees_an_events_data_as_two_lines() -> None:
    class Events:
        async def __aiter__(self) -> AsyncIterator[api.Event]:
            yield api.Event(name="token", data={"text": "a\x85b\u2028c\u2029d\n"})

        def cancel(self) -> None:
            """Nothing goes on."""

    response = await stream_events(Events())
    (line,) = [line async for line in response.body_iterator]
    assert isinstance(line, ServerSentEvent) and len(line.data.splitlines()) == 1
    assert json.loads(line.data) == {"text": "a\x85b\u2028c\u2029d\n"}


async def test_what_fails_before_the_first_event_is_a_problem_and_later_an_event() -> None:
    class Events:
        cancelled = False

        def __init__(self, count: int) -> None:
            self.count = count

        async def __aiter__(self) -> AsyncIterator[api.Event]:
            for _ in range(self.count):
                yield api.Event(name="token", data={"text": "a"})
            raise RayTaskError("ask", "traceback", ProblemError(503, "not now", {"clues": []})).as_instanceof_cause()

        def cancel(self) -> None:
            self.cancelled = True

    counted = InFlight(1)
    events = Events(0)
    with pytest.raises(ProblemError):
        await stream_events(events, counted)
    assert events.cancelled and counted.count == 0
    refused = Events(2)
    with pytest.raises(ProblemError, match="0 questions are being answered"):
        await stream_events(refused, InFlight(0))
    assert refused.cancelled
    events = Events(2)
    response = await stream_events(events, counted)
    assert counted.count == 1
    *tokens, last = [line async for line in response.body_iterator]
    assert len(tokens) == 2 and events.cancelled and counted.count == 0
    assert isinstance(last, ServerSentEvent) and last.event == "error"
    assert json.loads(last.data) == ProblemError(503, "not now", {"clues": []}).body()
