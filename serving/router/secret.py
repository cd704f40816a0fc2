"""The server's secret, and the salts made from it: what a client cannot guess, though it knows every id.

Two memories, or two tenants, share cached blocks in an engine only if their salts are equal; so a salt is an HMAC of
whose and which version it is, under a secret that never leaves the server.
"""

import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path

from cluster.storage.files import LocalFiles, files_at
from serving.config import ProfileError

logger = logging.getLogger(__name__)

ENVIRONMENT = "MEMORAG_SECRET"
_FILE = "secret"
_BYTES = 32


class SecretError(ProfileError):
    """There is no usable secret; the message says how to give one."""


def server_secret(storage_root: str) -> bytes:
    """The secret of the server on this storage: from the environment, else from a local root's file `secret`.

    The file is made on first use, for its owner alone; processes that come at once agree on one. Raises `SecretError`.
    """
    given = os.environ.get(ENVIRONMENT)
    if given is not None:
        if len(given) < _BYTES:
            raise SecretError(f"{ENVIRONMENT} has {len(given)} characters, fewer than {_BYTES}; {_HOW}")
        return given.encode()
    files, base = files_at(storage_root)
    if not isinstance(files, LocalFiles):
        raise SecretError(f"{storage_root} is an object store, so set {ENVIRONMENT} on every node; {_HOW}")
    return _from_file(Path(base) / _FILE)


def salt_of(secret: bytes, *parts: str) -> str:
    """A salt for these parts, in hexadecimal; other parts, also those of the same letters, give another."""
    digest = hmac.new(secret, digestmod=hashlib.sha256)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


_HOW = "make one with: openssl rand -hex 32"


def _from_file(path: Path) -> bytes:
    if not path.exists():
        _create(path)
    text = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != _BYTES:
        raise SecretError(
            f"{path} does not hold {2 * _BYTES} hexadecimal digits; {_HOW}, or delete it to have one made"
        )
    if path.stat().st_mode & 0o077:
        logger.warning("%s can be read by others than its owner; mend it with: chmod 600 %s", path, path)
    return secret


def _create(path: Path) -> None:
    """Writes a new secret beside its place and links it there: it appears whole, and the first of several stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(16)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_BYTES))
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)
    except FileExistsError:
        logger.info("another process made %s first", path)
    finally:
        temporary.unlink()
