"""Keys are kept as digests, come and go without a restart, and whatever is wrong lets nobody in."""

import asyncio
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.durable import Storage
from memory_worker.errors import InvalidId
from serving.errors import ProblemError
from serving.http.keys import DEFAULT_TENANT, Authenticator, KeyFile, KeyFileDamaged, UnknownKey


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def keys(storage: Storage) -> KeyFile:
    return KeyFile(storage)


async def status(authenticator: Authenticator, key: str | None) -> int | str:
    """The tenant, or the status of the refusal."""
    try:
        return await authenticator.tenant_of(None if key is None else f"Bearer {key}")
    except ProblemError as problem:
        assert key is None or len(key) < 20 or key not in problem.detail, "a refusal repeats the key"
        return problem.status


# -- the file ----------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_kept_as_its_digest(keys: KeyFile, tmp_path: Path) -> None:
    key = keys.create("library", "the reading room's")
    prefix, id, secret = key.split("_", 2)
    assert prefix == "mr" and len(secret) == 43
    [entry] = keys.entries()
    assert (entry.id, entry.tenant, entry.note) == (id, "library", "the reading room's")
    assert all(secret not in file.read_text() for file in tmp_path.iterdir())
    assert len({keys.create("library") for _ in range(5)}) == 5
    assert len({entry.id for entry in keys.entries()}) == 6


def test_revoking_forgets_one_key(keys: KeyFile) -> None:
    ids = [keys.create(tenant).split("_")[1] for tenant in ("a", "b", "a")]
    assert keys.revoke(ids[0]).tenant == "a"
    assert [entry.id for entry in keys.entries()] == ids[1:]
    with pytest.raises(UnknownKey, match=f"'{ids[0]}'; list those there are"):
        keys.revoke(ids[0])


@pytest.mark.parametrize("tenant", ["", "../a", "a/b", "a b", "é", ".hidden", "x" * 129])
def test_a_tenant_is_an_id(tenant: str, keys: KeyFile) -> None:
    with pytest.raises(InvalidId, match="tenant id"):
        keys.create(tenant)
    assert keys.entries() == ()


def test_no_change_of_several_at_once_is_lost(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def change(number: int) -> str:
        file = KeyFile(Storage(str(tmp_path)))
        together.wait()
        kept, dropped = file.create(f"t{number}"), file.create("dropped")
        file.revoke(dropped.split("_")[1])
        return kept.split("_")[1]

    with ThreadPoolExecutor(8) as pool:
        kept = set(pool.map(change, range(8)))
    assert {entry.id for entry in KeyFile(Storage(str(tmp_path))).entries()} == kept


DAMAGED = [
    "",
    "{",
    "[]",
    '{"keys": {}}',
    '{"keys": [{}]}',
    '{"keys": [], "admin": true}',
    json.dumps({"keys": [{"id": "0" * 8, "tenant": "../x", "sha256": "0" * 64, "created": ""}]}),
    json.dumps({"keys": [{"id": "0" * 8, "tenant": "x", "sha256": "", "created": ""}]}),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_refused_and_not_overwritten(content: str, keys: KeyFile, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(content)
    for attempt in (keys.entries, lambda: keys.create("a"), lambda: keys.revoke("00000000")):
        with pytest.raises(KeyFileDamaged, match=r"keys.json is damaged \(.+\); restore it"):
            attempt()
    assert (tmp_path / "keys.json").read_text() == content


# -- requests ----------------------------------------------------------------------------------------------


async def test_off_asks_for_nothing(storage: Storage) -> None:
    authenticator = Authenticator(storage, "off")
    assert await status(authenticator, None) == await status(authenticator, "anything") == DEFAULT_TENANT


async def test_a_key_names_its_tenant(storage: Storage, keys: KeyFile) -> None:
    a, b = keys.create("a"), keys.create("b")
    authenticator = Authenticator(storage, "keys")
    assert await status(authenticator, a) == "a" and await status(authenticator, b) == "b"
    assert await authenticator.tenant_of(f"bearer  {a} ") == "a"


async def test_everything_else_is_401(storage: Storage, keys: KeyFile) -> None:
    a, b = keys.create("a"), keys.create("b")
    authenticator = Authenticator(storage, "keys")
    mixed = "_".join(a.split("_", 2)[:2] + b.split("_", 2)[2:])
    unknown = "mr_00000000_" + a.split("_", 2)[2]
    for key in (None, "", a[:-1], a + "x", a.upper(), mixed, unknown, "mr_", "x" * 10_000, "ключ", "\udcff"):
        assert await status(authenticator, key) == 401, key
    for header in ("", "Bearer", "Basic " + a, a, "Bearer" + a):
        with pytest.raises(ProblemError) as refused:
            await authenticator.tenant_of(header)
        assert refused.value.status == 401
    digest = keys.entries()[0].sha256
    assert await status(authenticator, digest) == 401, "the file's content is no key"


async def test_no_file_lets_nobody_in(storage: Storage) -> None:
    assert await status(Authenticator(storage, "keys"), "mr_00000000_" + "a" * 43) == 401


async def test_keys_come_and_go_without_a_restart(storage: Storage, keys: KeyFile) -> None:
    clock = Clock()
    authenticator = Authenticator(storage, "keys", 2.0, clock)
    first = keys.create("a")
    assert await status(authenticator, first) == "a"
    second = keys.create("b")
    keys.revoke(first.split("_")[1])
    clock.now += 1.9
    assert [await status(authenticator, key) for key in (first, second)] == ["a", 401], "read again too soon"
    clock.now += 0.2
    assert [await status(authenticator, key) for key in (first, second)] == [401, "b"]
    clock.now -= 100  # a clock that goes backwards does not stop it
    keys.revoke(second.split("_")[1])
    assert await status(authenticator, second) == 401


async def test_many_requests_read_the_file_once(
    storage: Storage, keys: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, reads, read = keys.create("a"), [], KeyFile.entries
    monkeypatch.setattr(KeyFile, "entries", lambda file: (reads.append(1), read(file))[1])
    authenticator = Authenticator(storage, "keys", clock=Clock())
    assert set(await asyncio.gather(*(status(authenticator, key) for _ in range(100)))) == {"a"}
    assert len(reads) == 1


async def test_storage_that_fails_leaves_the_known_keys(
    storage: Storage, keys: KeyFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    authenticator, fresh = (Authenticator(storage, "keys", 2.0, clock) for _ in range(2))
    key = keys.create("a")
    assert await status(authenticator, key) == "a"

    def fail(_: KeyFile) -> Any:
        raise ConnectionError("no route to the bucket")

    with monkeypatch.context() as patched:
        patched.setattr(KeyFile, "entries", fail)
        clock.now += 10
        with caplog.at_level(logging.WARNING):
            assert await status(authenticator, key) == "a"
        assert "no route to the bucket" in caplog.text and key not in caplog.text
        assert await status(fresh, key) == 503, "a replica that knows no keys yet lets nobody in"
    clock.now += 10
    assert await status(fresh, key) == "a"


async def test_storage_that_hangs_does_not_stop_requests(
    storage: Storage, keys: KeyFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.http.keys._PATIENCE_S", 0.05)
    clock, gate, read = Clock(), threading.Event(), KeyFile.entries
    authenticator = Authenticator(storage, "keys", 2.0, clock)
    key = keys.create("a")
    assert await status(authenticator, key) == "a"
    keys_after_revoking = keys.create("b")
    monkeypatch.setattr(KeyFile, "entries", lambda file: (gate.wait(), read(file))[1])
    clock.now += 10
    try:
        for _ in range(20):
            assert await status(authenticator, key) == "a"  # or never, were it to wait for storage
            clock.now += 1
        assert caplog.text.count("storage does not answer") == 1
    finally:
        gate.set()
    while authenticator._reading is not None:
        await asyncio.wait({authenticator._reading})
    assert await status(authenticator, keys_after_revoking) == "b"


@pytest.mark.parametrize("content", DAMAGED[:3])
async def test_a_damaged_file_lets_nobody_in_until_it_is_mended(
    content: str, storage: Storage, keys: KeyFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    authenticator = Authenticator(storage, "keys", 2.0, clock)
    key = keys.create("a")
    assert await status(authenticator, key) == "a"
    whole = (tmp_path / "keys.json").read_text()
    (tmp_path / "keys.json").write_text(content)
    clock.now += 3
    assert await status(authenticator, key) == 503
    assert "every request is refused" in caplog.text and "restore it" in caplog.text
    (tmp_path / "keys.json").write_text(whole)
    clock.now += 3
    assert await status(authenticator, key) == "a"
