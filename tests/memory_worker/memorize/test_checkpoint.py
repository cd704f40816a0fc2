"""A memorize job that is cut short anywhere goes on, and its files are those of one that was not, byte for byte."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from memory_worker.memorize import checkpoint
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.messages import MemorizeProgress, MemorizeRequest, MemorizeResult
from memory_worker.storage.store import MemoryStore, checkpoint_path
from tests.support.memorizing import SEGMENT_TOKENS, TEXTS, config_for, files_of, steps_until, stored_request

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(random_model: Path) -> Path:
    return random_model


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(str(tmp_path))


@pytest.fixture(scope="module")
async def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, str]]:
    """The files of a job of one window a group that nothing disturbed."""
    store = MemoryStore(str(tmp_path_factory.mktemp("undisturbed")))
    request = new_request(store)
    *_, result = await steps_until(Memorizer(config_for(model, group_windows=1), store.storage.root), request)
    return files_of(result, request.key)


def new_request(store: MemoryStore, **changes: Any) -> MemorizeRequest:
    return stored_request(store, store.new_version("acme", "book"), **changes)


def read_checkpoint(store: MemoryStore, request: MemorizeRequest) -> dict[str, Any]:
    path = checkpoint_path(request.key)
    if not store.storage.exists(path):
        return {"segments": []}
    return json.loads(store.storage.read_unverified(path).to_pybytes())


def tokens_in(checkpoint: dict[str, Any]) -> int:
    return sum(segment["tokens"] for segment in checkpoint["segments"])


@pytest.mark.parametrize(
    ("group_windows", "checkpoint_windows", "dtype"),
    [
        pytest.param(1, 2, "float32", marks=pytest.mark.long),
        pytest.param(1, 2, "bfloat16", marks=pytest.mark.long),
        pytest.param(2, 4, "float32", marks=pytest.mark.long),
        pytest.param(2, 4, "bfloat16", marks=pytest.mark.long),
        (None, 5, "float32"),
        pytest.param(None, 5, "bfloat16", marks=pytest.mark.long),
    ],
)
async def test_a_job_given_up_after_any_group_goes_on_to_the_same_files(
    model: Path, store: MemoryStore, dtype: str, group_windows: int | None, checkpoint_windows: int
) -> None:
    settings = {"dtype": dtype, "group_windows": group_windows, "checkpoint_windows": checkpoint_windows}
    memorizer = Memorizer(config_for(model, **settings), store.storage.root)
    whole = new_request(store)
    *progress, result = await steps_until(memorizer, whole)
    expected = files_of(result, whole.key)
    assert isinstance(result, MemorizeResult)
    assert [len(segments) for segments in result.segments] == [1, 1, 1, 3, 1]
    ends = set(accumulate(segment.tokens for segments in result.segments for segment in segments))
    resumed_at = set()
    for stop in range(1, len(progress) + 1):
        request = new_request(store)
        await steps_until(memorizer, request, stop)
        durable = tokens_in(read_checkpoint(store, request))
        assert durable <= progress[stop - 1].done_tokens
        first, *_, end = await steps_until(memorizer, request)
        assert first == MemorizeProgress(durable, progress[0].total_tokens)
        assert files_of(end, request.key) == expected
        resumed_at.add(durable)
    assert resumed_at - ends - {0}, "some attempt went on within a segment"
    assert len(resumed_at) < len(progress), "some were given up between two flushes"
    again = await steps_until(memorizer, whole)
    assert again == [progress[-1], result], "a job that is done has nothing to do"


def torn_files(store: MemoryStore, request: MemorizeRequest) -> list[Path]:
    return list(Path(store.storage.root, request.key.path).rglob("*.tmp"))


@contextmanager
def failing_write(store: MemoryStore, number: int) -> Iterator[None]:
    """The storage fails when the file `number` (from 0) is to be written, with all of it written but not published."""
    storage, written = store.storage, 0
    good = storage.writer

    @contextmanager
    def writer(path: str) -> Iterator[Any]:
        nonlocal written
        with good(path) as sink:
            yield sink
            written += 1
            if written > number:
                raise OSError("the disk is full")

    storage.writer = writer  # type: ignore[method-assign]
    try:
        yield
    finally:
        storage.writer = good  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("dtype", "every"),
    [
        ("float32", 4),
        pytest.param("float32", 1, marks=pytest.mark.long),
        pytest.param("bfloat16", 1, marks=pytest.mark.long),
    ],
)
async def test_a_job_that_fails_at_any_write_goes_on_to_the_same_files(
    model: Path, store: MemoryStore, dtype: str, every: int
) -> None:
    """The head's file, every segment's file and every checkpoint; or every fourth of these writes."""
    memorizer = Memorizer(config_for(model, dtype=dtype, group_windows=2), store.storage.root)
    whole = new_request(store)
    *_, result = await steps_until(memorizer, whole)
    expected = files_of(result, whole.key)
    failures, resumed = 0, set()
    while True:
        request = new_request(store)
        try:
            with failing_write(memorizer._store, failures):
                await steps_until(memorizer, request)
            break
        except OSError:
            failures += every
        assert not torn_files(store, request)
        first, *_, end = await steps_until(memorizer, request)
        assert isinstance(first, MemorizeProgress)
        resumed.add(first.done_tokens)
        assert files_of(end, request.key) == expected
    flushes = failures - len(expected)
    assert flushes >= 4 and (len(resumed) > 2 if every > 1 else len(resumed) == flushes), (
        "each flush is where some attempt went on from"
    )


async def test_a_job_cut_short_again_and_again_ends_with_the_same_files(model: Path, store: MemoryStore) -> None:
    memorizer = Memorizer(config_for(model, group_windows=1, checkpoint_windows=3), store.storage.root)
    whole, request = new_request(store), new_request(store)
    *_, result = await steps_until(memorizer, whole)
    attempts, end = 0, None
    while not isinstance(end, MemorizeResult):
        *_, end = await steps_until(memorizer, request, 5)  # three windows and one in vain
        attempts += 1
    assert attempts > 4
    assert files_of(end, request.key) == files_of(result, whole.key)


async def test_a_process_that_is_killed_is_taken_up_by_the_next(model: Path, store: MemoryStore) -> None:
    whole, request = new_request(store), new_request(store)
    memorizer = Memorizer(config_for(model), store.storage.root)
    *_, result = await steps_until(memorizer, whole)
    command = [sys.executable, "-m", "tests.support.memorizing"]
    arguments = [str(model), store.storage.root, request.key.version]

    def run_until_progress() -> int:
        child = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        with child, child.stdout:
            for _ in child.stdout:
                if tokens_in(read_checkpoint(store, request)) > 1000:
                    child.send_signal(signal.SIGKILL)
                    break
        return child.returncode

    assert await asyncio.to_thread(run_until_progress) == -signal.SIGKILL
    durable = tokens_in(read_checkpoint(store, request))
    first, *_, end = await steps_until(memorizer, request)
    assert isinstance(first, MemorizeProgress) and 1000 < durable == first.done_tokens < first.total_tokens
    assert files_of(end, request.key) == files_of(result, whole.key)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("segment", "segments/.*does not match its SHA-256"),
        ("missing", "segments/.*is missing"),
        ("head", "head.safetensors.*does not match its SHA-256"),
        ("garbage", "it is not one"),
        ("cut", "it is not one"),
        ("format", "it is of other work: format"),
        ("tokens", "counts other segments than its plan"),
        ("within", "ends within a window"),
        ("slots", "does not say what .*segments/.* hold"),
        ("swapped", "does not say what .*segments/.* hold"),
    ],
)
async def test_a_checkpoint_that_is_damaged_is_begun_anew_with_a_warning(
    model: Path, expected: Any, store: MemoryStore, caplog: Any, monkeypatch: Any, what: str, message: str
) -> None:
    memorizer = Memorizer(config_for(model, group_windows=1), store.storage.root)
    request = new_request(store)
    await steps_until(memorizer, request, 10)
    _damage(store, request, what)
    monkeypatch.setattr(checkpoint.logger, "propagate", True)
    with caplog.at_level("WARNING", logger=checkpoint.logger.name):
        first, *_, end = await steps_until(memorizer, request)
    assert isinstance(first, MemorizeProgress) and first.done_tokens == 0
    assert files_of(end, request.key) == expected
    (warning,) = {record.getMessage() for record in caplog.records if record.name == checkpoint.logger.name}
    assert checkpoint_path(request.key) in warning
    assert re.search(message, warning), warning


def _damage(store: MemoryStore, request: MemorizeRequest, what: str) -> None:
    """To the checkpoint of a job that was cut short."""
    path = Path(store.storage.root, checkpoint_path(request.key))
    content = json.loads(path.read_text())
    segments = content["segments"]
    assert len(segments) > 2 and segments[-1]["tokens"] % 512 == 0
    file = Path(store.storage.root, segments[1]["files"][0]["path"])
    match what:
        case "segment":
            file.write_bytes(file.read_bytes()[:-1] + b"x")
        case "missing":
            file.unlink()
        case "head":
            head = Path(store.storage.root, content["head"]["path"])
            head.write_bytes(head.read_bytes()[:-1] + b"x")
        case "garbage":
            path.write_bytes(b"\xff\x00")
        case "cut":
            path.write_bytes(path.read_bytes()[:-9])
        case "format":
            content["plan"]["format"] = 0
        case "tokens":
            segments[1]["tokens"] += 1
        case "within":
            segments[-1]["tokens"] -= 1
        case "slots":
            segments[1]["slots"] += 1
        case "swapped":
            segments[0]["files"], segments[1]["files"] = segments[1]["files"], segments[0]["files"]
    if what not in ("segment", "missing", "head", "garbage", "cut"):
        path.write_text(json.dumps(content))


def other_text(store: MemoryStore, request: MemorizeRequest) -> MemorizeRequest:
    """The first document's text replaced."""
    other = store.write_source(request.key, "short", TEXTS["short"].replace("noon", "dusk"))
    return replace(request, documents=(other, *request.documents[1:]))


@pytest.mark.parametrize(
    "changed",
    [
        lambda store, request: replace(request, ratio=16),
        lambda store, request: replace(request, language="zh"),
        lambda store, request: replace(request, documents=request.documents[::-1]),
        lambda store, request: replace(request, documents=request.documents[1:]),
        other_text,
    ],
    ids=["ratio", "language", "order", "fewer", "text"],
)
async def test_another_request_does_not_go_on_from_a_checkpoint(model: Path, store: MemoryStore, changed: Any) -> None:
    memorizer = Memorizer(config_for(model, group_windows=1), store.storage.root)
    request, fresh = new_request(store), new_request(store)
    await steps_until(memorizer, request, 10)
    assert tokens_in(read_checkpoint(store, request)) > 0
    first, *_, end = await steps_until(memorizer, changed(store, request))
    assert isinstance(first, MemorizeProgress) and first.done_tokens == 0
    *_, expected = await steps_until(memorizer, changed(store, fresh))
    assert files_of(end, request.key) == files_of(expected, fresh.key)


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"group_windows": 2}, {"checkpoint_windows": 3}, {"segment_tokens": 1024}]
)
async def test_other_settings_do_not_go_on_from_a_checkpoint(
    model: Path, store: MemoryStore, settings: dict[str, Any]
) -> None:
    request, fresh = new_request(store), new_request(store)
    await steps_until(Memorizer(config_for(model, group_windows=1), store.storage.root), request, 10)
    assert tokens_in(read_checkpoint(store, request)) > 0
    memorizer = Memorizer(config_for(model, **{"group_windows": 1, **settings}), store.storage.root)
    first, *_, end = await steps_until(memorizer, request)
    assert isinstance(first, MemorizeProgress) and first.done_tokens == 0
    *_, expected = await steps_until(memorizer, fresh)
    assert files_of(end, request.key) == files_of(expected, fresh.key)


async def test_a_checkpoint_holds_only_for_the_head_it_was_made_with(model: Path, store: MemoryStore) -> None:
    memorizer = Memorizer(config_for(model, group_windows=1), store.storage.root)
    base, request = new_request(store), new_request(store)
    *_, made = await steps_until(memorizer, base)
    assert isinstance(made, MemorizeResult)
    changing = replace(request, head=made.head)
    for one, durable in [(request, False), (changing, False), (changing, True), (request, False)]:
        first, *_ = await steps_until(memorizer, one, 10)
        assert isinstance(first, MemorizeProgress) and bool(first.done_tokens) == durable
    *_, end = await steps_until(memorizer, changing)
    assert isinstance(end, MemorizeResult) and end.head == made.head
    assert files_of(end, request.key)[1:] == files_of(made, base.key)[1:]


async def test_what_is_pending_is_bounded_by_the_interval(model: Path, store: MemoryStore) -> None:
    """In memory: no more windows than the interval and one group; on disk: no more in one file."""
    memorizer = Memorizer(config_for(model, group_windows=1, checkpoint_windows=2), store.storage.root)
    request = new_request(store)
    async for step in memorizer.memorize(request):
        if isinstance(step, MemorizeProgress):
            assert step.done_tokens - tokens_in(read_checkpoint(store, request)) <= 2 * 512
        else:
            files = [f for segments in step.segments for segment in segments for f in segment.files]
            assert max(store.read_segment(file).slots for file in files) <= 2 * 512 // request.ratio
            assert max(segment.tokens for segments in step.segments for segment in segments) == SEGMENT_TOKENS
