"""API keys: who a request comes from. `memorag keys` writes them, the Ingress asks for them.

A key is `mr_<id>_<secret>` with 256 random bits in the secret. Only the SHA-256 of the whole key is kept: a slow
password hash defends short secrets that people choose, and there is nothing to try out in 256 random bits.
"""

import asyncio
import fcntl
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from cluster.config import Settings
from cluster.errors import MessageError
from cluster.storage.durable import Storage
from cluster.storage.files import files_at
from memory_worker.manifest import now
from memory_worker.storage.store import check_id
from serving.errors import ProblemError

logger = logging.getLogger(f"ray.serve.{__name__}")  # with its replica and request id

DEFAULT_TENANT = "default"  # owns everything where keys are off
_PATH = "keys.json"
_LOCK = "keys.lock"
_KEY = re.compile(r"mr_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_NO_KEY = "0" * 64  # no key's digest: what an unknown id's key is compared with, in the time of any other
_PATIENCE_S = 1.0  # how long requests wait for the key file, when what it said before is known


class KeyEntry(Settings):
    """What is kept of one key."""

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    tenant: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the whole key
    created: str  # ISO 8601, UTC
    note: str = ""


class _Keys(Settings):
    keys: tuple[KeyEntry, ...] = ()


class KeyFileDamaged(MessageError):
    """`keys.json` is not what `memorag keys` wrote: nobody is let in until it is mended."""


class UnknownKey(MessageError):
    """There is no key of this id."""


class KeyFile:
    """The keys of one server, in `keys.json` under its storage root. Every method touches the disk or network.

    Writers of local storage take turns, so none undoes another's change. An object store has no such lock: of two
    that write at the same moment the last one wins, and the other's change is lost.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def create(self, tenant: str, note: str = "") -> str:
        """A new key of `tenant`, which is kept nowhere: show it once. Raises `InvalidId`."""
        check_id(tenant, "tenant")
        with self._writing():
            entries = self.entries()
            id = _new_id({entry.id for entry in entries})
            key = f"mr_{id}_{secrets.token_urlsafe(32)}"
            self._write((*entries, KeyEntry(id=id, tenant=tenant, sha256=_digest(key), created=now(), note=note)))
        return key

    def entries(self) -> tuple[KeyEntry, ...]:
        """All keys, the oldest first. Raises `KeyFileDamaged`."""
        try:
            text = self._storage.read_unverified(_PATH).to_pybytes()
        except FileNotFoundError:
            return ()
        try:
            return _Keys.model_validate_json(text).keys
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise KeyFileDamaged(
                f"{self._storage.root}/{_PATH} is damaged ({where or 'file'}: {first['msg']}); restore it, or delete "
                "it and make new keys with: memorag keys create TENANT"
            ) from None

    def revoke(self, id: str) -> KeyEntry:
        """Forgets the key of this id; requests with it are refused from the Ingress' next look. Raises `UnknownKey`."""
        with self._writing():
            entries = self.entries()
            found = next((entry for entry in entries if entry.id == id), None)
            if found is None:
                raise UnknownKey(f"there is no key {id!r}; list those there are with: memorag keys list")
            self._write(tuple(entry for entry in entries if entry.id != id))
        return found

    def _write(self, entries: tuple[KeyEntry, ...]) -> None:
        self._storage.write(_PATH, _Keys(keys=entries).model_dump_json(indent=1).encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if not self._storage.is_local:
            yield
            return
        with (Path(files_at(self._storage.root)[1]) / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a killed process
            yield


class Authenticator:
    """Tells the Ingress which tenant a request comes from.

    In mode `keys` it reads the key file again when asked later than `refresh_s` seconds after the last time, so keys
    are made and revoked without a restart. While storage does not answer it goes on with what it knows; a damaged
    file lets nobody in.
    """

    def __init__(
        self,
        storage: Storage,
        mode: Literal["off", "keys"],
        refresh_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = KeyFile(storage)
        self._mode = mode
        self._refresh_s = refresh_s
        self._clock = clock
        self._entries: dict[str, KeyEntry] | None = None  # none: not to be known, so nobody is let in
        self._asked = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._warned: asyncio.Task[None] | None = None  # the reading of which the log says that it is slow

    async def tenant_of(self, authorization: str | None) -> str:
        """The tenant whose key the `Authorization` header carries. Raises `ProblemError` 401, or 503 without keys."""
        if self._mode == "off":
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ProblemError(401, "this server wants an API key; send the header 'Authorization: Bearer KEY'")
        entries = await self._get_known()
        if entries is None:
            raise ProblemError(503, "the server cannot read its API keys just now; its operator finds why in its log")
        matched = _KEY.fullmatch(key.strip())
        entry = entries.get(matched[1]) if matched else None
        same = hmac.compare_digest(_digest(key.strip()), entry.sha256 if entry else _NO_KEY)
        if entry is None or not same:
            raise ProblemError(401, "this API key is unknown or was revoked; ask the server's operator for another")
        return entry.tenant

    async def _get_known(self) -> dict[str, KeyEntry] | None:
        """The keys, from a reading that began at most `refresh_s` ago if storage is quick."""
        elapsed = self._clock() - self._asked
        if self._reading is None and not 0 <= elapsed < self._refresh_s:
            self._asked, elapsed = self._clock(), 0.0
            self._reading = asyncio.create_task(self._read())
        if reading := self._reading:
            wait_s = None if self._entries is None else max(0.0, _PATIENCE_S - elapsed)
            await asyncio.wait({reading}, timeout=wait_s)
            if reading.done():
                reading.result()  # raises what was not foreseen
            elif self._warned is not reading:
                self._warned = reading
                logger.warning("storage does not answer with the API keys, going on with those that are known")
        return self._entries

    async def _read(self) -> None:
        try:
            entries = await asyncio.to_thread(self._file.entries)
            self._entries = {entry.id: entry for entry in entries}
        except KeyFileDamaged as damage:
            self._entries = None
            logger.error("every request is refused: %s", damage)
        except OSError as error:
            logger.warning("the API keys cannot be read again, going on with what is known: %s", error)
        finally:
            self._reading = None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def _new_id(taken: set[str]) -> str:
    while (id := secrets.token_hex(4)) in taken:
        pass
    return id
