"""Each failure is the right problem, whoever wrapped it on its way."""

import pickle

import pytest
from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import EngineFailed
from cluster.storage.durable import DamagedFile, StorageFull, StorageGone
from memory_worker import errors as memory_errors
from memory_worker.errors import DamagedMemory, MemoryNotFound, QuotaExceeded, VersionChanged
from serving.errors import ProblemError, cause_of, damaged_path, is_callers_fault, is_unavailable, problem_for


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


@pytest.mark.parametrize("error", [e for e in vars(memory_errors).values() if isinstance(e, type)])
def test_no_error_of_a_memory_is_unforeseen(error: type) -> None:
    """Those that only a job meets are 500 to nobody: they become the memory's own error."""
    of_jobs = {"MemoryProblem", "JobEnded", "LostRank", "WindowTooLarge", "MixedMemories"}
    if issubclass(error, memory_errors.MemoryProblem) and error.__name__ not in of_jobs:
        arguments = {"QueueFull": (3,), "QuotaExceeded": ("x", 1, 2), "MemoryTooLarge": ("m", 1, 2)}
        count = error.__init__.__code__.co_argcount - 1
        assert problem_for(error(*arguments.get(error.__name__, ("x",) * count))).status < 500


def test_a_problem_crosses_processes_with_its_members() -> None:
    problem = pickle.loads(pickle.dumps(ProblemError(429, "slow", {"retry_after": 2.4})))  # noqa: S301
    assert (problem.status, str(problem), problem.members) == (429, "slow", {"retry_after": 2.4})
    assert problem.headers == {"Retry-After": "3"}
    assert problem.with_members(clues=[]).body() == {
        "type": "about:blank", "title": "Too Many Requests", "status": 429, "detail": "slow", "retry_after": 2.4,
        "clues": [],
    }  # fmt: skip


def test_which_file_is_damaged_and_who_may_be_asked_again() -> None:
    assert damaged_path(wrapped(DamagedFile("a/b.arrow", "is missing"))) == "a/b.arrow"
    assert damaged_path(wrapped(DamagedMemory("a/b.arrow", "is no Arrow"))) == "a/b.arrow"
    assert damaged_path(ValueError()) is None
    assert all(is_unavailable(wrapped(e)) for e in (RayActorError(), EngineFailed("x"), TimeoutError()))
    assert not any(is_unavailable(wrapped(e)) for e in (MemoryNotFound("m"), DamagedFile("a", "b"), ValueError()))
    assert problem_for(ProblemError(401, "no key")).headers == {"WWW-Authenticate": "Bearer"}
