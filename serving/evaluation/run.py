"""A run's folder: what was asked for, and a row for each question and method that is done. Killed, it goes on.

OUT/run.json      the settings; a run with others needs another folder
OUT/rows.jsonl    rows in the order they came; the last of a question and method counts
OUT/storage/      of the server that the run started, until all is asked
OUT/report.json, report.svg
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import MessageError
from serving.evaluation.datasets import Example
from serving.evaluation.methods import Row


class EvaluationError(MessageError):
    """A folder that cannot be used for this run; the message says why."""


class Run:
    """One run's rows on disk. `record` may be called by several threads."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises `EvaluationError` where the folder holds a run with other settings."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.storage = folder.resolve() / "storage"  # of the server that the run starts
        self._path = folder / "rows.jsonl"
        self._lock = threading.Lock()
        _check(folder / "run.json", settings)
        self._rows = {_key(row): row for row in _read(self._path)}

    @property
    def rows(self) -> list[Row]:
        """All rows, by question and method."""
        return [self._rows[key] for key in sorted(self._rows)]

    def lacks(self, example: Example, method: str) -> bool:
        """Whether the question is still to be asked: it has no row, or one that failed."""
        row = self._rows.get((example.id, method))
        return row is None or "error" in row

    def record(self, row: Row) -> None:
        """Keeps a row, whatever becomes of this process."""
        with self._lock:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._rows[_key(row)] = row


def fingerprint(examples: Sequence[Example]) -> str:
    """Names the questions: their texts, answers and metrics."""
    digest = hashlib.sha256()
    for each in examples:
        digest.update(repr((each.id, each.document, each.question, each.answers, each.metric)).encode())
    return digest.hexdigest()[:16]


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is damaged ({error}); use another folder") from None
    if other := [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]:
        raise EvaluationError(
            f"{path.parent} holds a run with another {', '.join(sorted(other))}; use another folder, or delete it"
        )


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[-1]:  # the process was killed while it wrote: the question is asked again
        whole = "\n".join([*lines[:-1], ""])
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in lines[:-1]]


def _key(row: Row) -> tuple[str, str]:
    return row["example"], row["method"]
