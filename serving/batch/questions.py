"""The questions of a batch run: read with Ray Data, put in order, told apart. The run's actor calls this."""

import difflib
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.storage.durable import Storage
from cluster.storage.files import files_at
from serving.batch.job import BatchError, locate

if TYPE_CHECKING:
    from ray.data import Dataset

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "memory": pa.string(),
        "question": pa.string(),
        "task": pa.string(),
        "max_tokens": pa.int64(),
        "language": pa.string(),
    }
)
_REQUIRED = ("id", "memory", "question")
_PARQUET = {".parquet"}
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_ROWS_AT_A_TIME = 1024
_BLOCK_BYTES = 32 << 20  # of the files that one task reads


@dataclass(frozen=True)
class BatchQuestion:
    """One row of the questions. What is not given is none; whether it is valid has not been asked yet."""

    id: str
    memory: str
    question: str
    task: str | None = None
    max_tokens: int | None = None
    language: str | None = None

    @cached_property
    def key(self) -> bytes:
        """16 bytes that stand for everything the row says: the same question asked the same way has the same key."""
        return hashlib.blake2b(json.dumps(astuple(self)).encode(), digest_size=16).digest()


class Questions:
    """All questions of one file, folder or URI, in the order in which they are asked."""

    def __init__(self, source: str, grouped: bool) -> None:
        """Reads and sorts; takes as long as that takes. `grouped`: by memory, then id; otherwise as they are stored.

        Raises `BatchError` for files that are not there, of another kind, or without the columns.
        """
        read = _read(source).materialize()
        self.ignored = _check_columns(read.schema().names)  # columns that are no part of a question
        dataset = read.map_batches(_conform, batch_format="pyarrow", batch_size=None)
        if grouped:
            dataset = dataset.sort(["memory", "id"])
        self._dataset = dataset.materialize()
        self.count: int = self._dataset.count()

    def __iter__(self) -> Iterator[list[BatchQuestion]]:
        """The questions, some at a time."""
        for batch in self._dataset.iter_batches(batch_size=_ROWS_AT_A_TIME, batch_format="pyarrow", prefetch_batches=1):
            yield questions_in(batch)


def questions_of(questions: "str | Path | pa.Table", output: str) -> str:
    """Where the questions lie: a table is put beside the answers, so that it outlives the process that has it.

    Raises `BatchError` for files that are not there, or of another kind.
    """
    if not isinstance(questions, pa.Table):
        source = locate(questions)
        _kind_and_size(source)
        return source
    sink = io.BytesIO()
    pq.write_table(questions, sink)
    name = f"_questions-{hashlib.sha256(sink.getvalue()).hexdigest()[:16]}.parquet"
    Storage(output).write(name, sink.getvalue())
    return f"{output}/{name}"


def questions_in(table: pa.Table) -> list[BatchQuestion]:
    """The rows of a table with the columns of `SCHEMA`, such as the answers are kept in."""
    columns = (table.column(name).to_pylist() for name in SCHEMA.names)
    return [BatchQuestion(*row) for row in zip(*columns, strict=True)]


def _read(source: str) -> "Dataset":
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # of the log
    context.execution_options.preserve_order = True
    kind, size = _kind_and_size(source)
    where: dict[str, Any] = {"override_num_blocks": 1 + size // _BLOCK_BYTES}
    if "://" not in source:  # it lies on the node that the run is on, and is read there
        where["label_selector"] = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    if kind in _PARQUET:
        return ray.data.read_parquet(source, **where)
    return ray.data.read_json(source, lines=True, file_extensions=None, **where)


def _kind_and_size(source: str) -> tuple[str, int]:
    """The extension that says what the files are, and their bytes together. Raises `BatchError`."""
    files, path = files_at(source)
    kind = files.kind(path)
    if kind == fs.FileType.NotFound:
        raise BatchError(f"{source} is not there; give a file or folder of questions that this node can read")
    found = files.list(path, recursive=True) if kind == fs.FileType.Directory else [files.info(path)]
    known = {suffix for f in found if (suffix := PurePosixPath(f.path).suffix.lower()) in _PARQUET | _JSON_LINES}
    if not known or (known & _PARQUET and known & _JSON_LINES):
        has = "has files of both kinds" if known else "has no such file"
        raise BatchError(f"questions are Parquet (.parquet) or JSON Lines (.jsonl, .ndjson, .json); {source} {has}")
    return known.pop(), sum(info.size or 0 for info in found)


def _check_columns(names: list[str]) -> list[str]:
    """The columns that are no part of a question. Raises `BatchError` for those that are missing or misspelt."""
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise BatchError(
            f"the questions have no column {', '.join(missing)}; they need id, memory and question, and may have "
            f"task, max_tokens and language; their columns are {', '.join(names)}"
        )
    ignored = [name for name in names if name not in SCHEMA.names]
    for name in ignored:
        if close := difflib.get_close_matches(name, [n for n in SCHEMA.names if n not in names], n=1, cutoff=0.8):
            raise BatchError(f"the questions have a column {name!r}; did you mean {close[0]!r}? Rename it, or drop it")
    return ignored


def _conform(table: pa.Table) -> pa.Table:
    """`table` in the form of `SCHEMA`: one that has a column of another type is cast, one that lacks it gets nulls."""
    columns = []
    for field in SCHEMA:
        if field.name in table.column_names:
            column = table.column(field.name).cast(field.type)
        else:
            column = pa.nulls(table.num_rows, field.type)
        columns.append(column.fill_null("") if field.name in _REQUIRED else column)
    return pa.table(columns, schema=SCHEMA)
