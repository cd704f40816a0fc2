"""The secret is made once and kept from others; salts tell everything apart."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.router.secret import SecretError, salt_of, server_secret


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMORAG_SECRET", raising=False)


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    secret = server_secret(str(root))
    assert len(secret) == 32 and server_secret(str(root)) == secret
    assert server_secret(f"file://{root}") == secret
    assert (root / "secret").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in root.iterdir()] == ["secret"]
    assert server_secret(str(tmp_path / "other")) != secret


def test_all_that_come_at_once_agree(tmp_path: Path) -> None:
    """Threads here, processes in life: the file is all that they share."""
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            root, together = tmp_path / str(number), threading.Barrier(8)

            def ask(_: int, root: Path = root, together: threading.Barrier = together) -> bytes:
                together.wait()
                return server_secret(str(root))

            assert len(set(pool.map(ask, range(8)))) == 1
            assert [file.name for file in root.iterdir()] == ["secret"]


def test_the_environment_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORAG_SECRET", "s" * 32)
    assert server_secret(str(tmp_path)) == b"s" * 32 == server_secret("s3://bucket/memories?region=eu-west-1")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MEMORAG_SECRET", "short")
    with pytest.raises(SecretError, match="has 5 characters, fewer than 32; make one with: openssl rand -hex 32"):
        server_secret(str(tmp_path))


def test_an_object_store_needs_the_environment() -> None:
    with pytest.raises(SecretError, match="object store, so set MEMORAG_SECRET on every node"):
        server_secret("s3://bucket/memories?region=eu-west-1")


@pytest.mark.parametrize("content", ["", "secret", "ab" * 31, "zz" * 32, "é" * 64])
def test_a_damaged_secret_is_refused_and_not_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(content, encoding="utf-8")
    with pytest.raises(SecretError, match="does not hold 64 hexadecimal digits"):
        server_secret(str(tmp_path))
    assert (tmp_path / "secret").read_text(encoding="utf-8") == content


def test_a_secret_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server_secret(str(tmp_path))
    assert not caplog.records
    (tmp_path / "secret").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        server_secret(str(tmp_path))
    assert "chmod 600" in caplog.text


def test_salts_tell_everything_apart() -> None:
    key = b"k" * 32
    salts = [salt_of(key, *parts) for parts in [(), ("",), ("", ""), ("ab", "c"), ("a", "bc"), ("abc",), ("é",)]]
    salts.append(salt_of(b"l" * 32, "abc"))
    assert len(set(salts)) == len(salts)
    assert all(len(salt) == 64 for salt in salts)
    assert salt_of(key, "ab", "c") == salt_of(key, "ab", "c")
