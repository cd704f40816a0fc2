"""Many files at once, each a memory of its own: what `memorag memorize --recursive` does. It speaks HTTP."""

import hashlib
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tenacity import Retrying, retry_if_exception_type, sleep_using_event, stop_when_event_set

from cluster.planning.costs import MemoryKind
from serving.batch.job import until_ready
from serving.batch.progress import OnCount
from serving.client.client import MemoRAG, Memory
from serving.client.errors import MemoRAGError, ServerUnreachable
from serving.documents.convert import KINDS

_ID_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class FileResult:
    """What became of one file."""

    file: str  # below the folder, with forward slashes
    memory: str
    state: Literal["made", "there", "failed"]  # there: the memory was ready, or being made, before
    error: str | None = None


@dataclass(frozen=True, slots=True)
class FilesReport:
    """What became of all files of a folder."""

    files: tuple[FileResult, ...]  # in the order of their names
    other: int  # files of kinds that cannot be memorized
    seconds: float

    def count(self, state: str) -> int:
        return sum(file.state == state for file in self.files)

    def as_json(self) -> dict[str, Any]:
        counts = {state: self.count(state) for state in ("made", "there", "failed")}
        return counts | {"other": self.other, "seconds": self.seconds, "files": [asdict(file) for file in self.files]}


def memorize_folder(
    client: MemoRAG,
    folder: Path,
    *,
    concurrency: int = 4,
    tags: Sequence[str] = (),
    kind: MemoryKind | None = None,
    ratio: int | None = None,
    patience_s: float = 300.0,
    show: OnCount = lambda done, total, before: None,
) -> FilesReport:
    """Makes a memory of every text, Markdown, HTML, PDF and Word file below `folder`; returns when all are ready.

    A memory's id is made of its file's path (`memory_id`). One that is there already stays as it is, so a run that was
    killed goes on where it stopped. At most `concurrency` files are under way. A file that cannot be memorized is
    counted as failed, after `patience_s` seconds where the server only said "not now". Hidden files are left out.
    """
    began = time.monotonic()
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    files = [path for path in found if path.suffix.lower() in KINDS]
    given_up = threading.Event()
    patience = until_ready(patience_s)
    patience["retry"] |= retry_if_exception_type(ServerUnreachable)
    patience["stop"] |= stop_when_event_set(given_up)
    retrying = Retrying(**patience, sleep=sleep_using_event(given_up))

    def make(path: Path) -> FileResult:
        name = path.relative_to(folder).as_posix()
        id = memory_id(name)
        try:
            _, made = retrying.copy()(memorize_once, client, id, path, title=name, tags=tags, kind=kind, ratio=ratio)
        except (MemoRAGError, OSError) as error:
            return FileResult(name, id, "failed", str(error))
        return FileResult(name, id, "made" if made else "there")

    results: list[FileResult] = []
    with ThreadPoolExecutor(concurrency) as threads:
        running = [threads.submit(make, path) for path in files]
        try:
            show(0, len(files), 0)
            for done in as_completed(running):
                results.append(done.result())
                there = sum(result.state == "there" for result in results)
                show(len(results), len(files), there)
        except BaseException:
            given_up.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    results.sort(key=lambda result: result.file)
    return FilesReport(tuple(results), len(found) - len(files), time.monotonic() - began)


def memory_id(name: str) -> str:
    """The id of the memory of the file with that path: `/` becomes `--`; what no id may have costs a digest at the end.

    Different paths have different ids.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name.replace("/", "--")).lstrip(".")
    if plain == name.replace("/", "--") and "--" not in name and len(plain) <= _ID_CHARACTERS:
        return plain
    return f"{plain[:_ID_CHARACTERS]}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


def memorize_once(client: MemoRAG, id: str, *paths: Path, **given: Any) -> tuple[Memory, bool]:
    """The memory of that id, ready, and whether it was this call that made it, of what `MemoRAG.memorize` takes."""
    try:
        there = client.memory(id)
    except MemoRAGError as error:
        if error.status != 404:
            raise
    else:
        if there.status == "memorizing":
            there.wait(progress=False)
        if there.status != "failed":
            return there, False  # ready, whatever else is being made of it
    try:
        return client.memorize(*paths, id=id, progress=False, **given), True
    except MemoRAGError as error:
        if error.status != 409:
            raise
        return client.memory(id).wait(progress=False), False  # another made it in the meantime


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
