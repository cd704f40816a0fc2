"""The answers of a batch run on disk: what is recorded, durably and whole, is never asked again.

    <output>/_run.json              which run this folder belongs to, and whose memories were asked
    <output>/part-00000.parquet …   answers, a fixed number of rows each but for the last
    <output>/_recorded/…            answers that are recorded and not yet part of a part: a few rows each

Every file is written under another name, forced to disk and renamed (`cluster.storage.durable`). A recorded file is
deleted after the part that holds its rows is there: cut short in between, its rows are known from the part. Readers of
Parquet folders leave out names that begin with an underscore.
"""

import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage.durable import Storage
from serving import api
from serving.batch.job import BatchError
from serving.batch.questions import SCHEMA as QUESTIONS
from serving.batch.questions import BatchQuestion, questions_in
from serving.errors import ProblemError

_RUN = "_run.json"
_RECORDED = "_recorded"
_PLACE = {"memory": pa.string(), "document": pa.string(), "start": pa.int64(), "end": pa.int64()}
_QUOTED = _PLACE | {"text": pa.string(), "score": pa.float64()}


def _structs(fields: dict[str, pa.DataType]) -> pa.ListType:
    return pa.list_(pa.struct(fields))


ANSWERS = pa.schema(
    [
        *QUESTIONS,
        pa.field("answer", pa.string()),
        pa.field("version", pa.string()),
        pa.field("citations", _structs({"n": pa.int64()} | _PLACE)),
        pa.field("evidence", _structs(_QUOTED)),
        pa.field("clues", _structs({"kind": pa.string(), "text": pa.string()})),
        pa.field("passages", _structs(_QUOTED)),
        pa.field("degraded", pa.list_(pa.string())),
        pa.field("usage", pa.struct(dict.fromkeys(api.Usage.model_fields, pa.int64()))),
        pa.field("timings_ms", pa.struct(dict.fromkeys(api.Timings.model_fields, pa.float64()))),
        pa.field("error", pa.struct({"status": pa.int64(), "title": pa.string(), "detail": pa.string()})),
    ]
)


def make_answer_row(question: BatchQuestion, answer: api.Answer) -> dict[str, Any]:
    """The row of a question that was answered; its `error` is null."""
    return answer.model_dump(exclude={"memories", "memory", "task"}) | asdict(question)


def make_failure_row(question: BatchQuestion, problem: ProblemError) -> dict[str, Any]:
    """The row of a question that failed; beside question and `error` all of it is null."""
    body = problem.body()
    return asdict(question) | {"error": {name: body[name] for name in ("status", "title", "detail")}}


class Answers:
    """The output folder of one run; only one process may have it open. Every method touches the disk or network."""

    def __init__(self, output: str, tenant: str, rows_per_part: int) -> None:
        """Opens the folder, or begins it. Raises `BatchError` where it belongs to something else."""
        self._storage = Storage(output)
        self._rows_per_part = rows_per_part
        self.run = self._open(output, tenant)  # a name that no other run has
        self._storage.sweep_torn(older_than_s=0)
        self.keys: set[bytes] = set()  # of the questions whose rows were recorded when the folder was opened
        files = self._storage.files()
        parts = [path for path in files if path.startswith("part-")]
        self.parts = len(parts)
        for path in parts:
            self.keys.update(q.key for q in questions_in(self._read(path, QUESTIONS.names)))
        self._recorded: list[tuple[str, pa.Table]] = []
        for path in [path for path in files if path.startswith(f"{_RECORDED}/")]:
            table = self._read(path)
            if (keys := {q.key for q in questions_in(table)}) <= self.keys:
                self._storage.delete(path)
            else:
                self.keys |= keys
                self._recorded.append((path, table))

    def record(self, rows: Sequence[dict[str, Any]]) -> None:
        """Records rows: they survive any kill once this returns."""
        table = pa.Table.from_pylist(list(rows), ANSWERS)
        path = f"{_RECORDED}/{uuid.uuid4().hex}.parquet"
        self._write(path, table)
        self._recorded.append((path, table))
        if sum(table.num_rows for _, table in self._recorded) >= self._rows_per_part:
            self.fold()

    def fold(self) -> None:
        """Makes one part of all that is recorded and in none."""
        if not self._recorded:
            return
        self._write(f"part-{self.parts:05d}.parquet", pa.concat_tables([table for _, table in self._recorded]))
        self.parts += 1
        for path, _ in self._recorded:
            self._storage.delete(path)
        self._recorded.clear()

    def drop_failed(self) -> int:
        """Forgets the rows with an error, so that their questions are asked again; returns how many there were."""
        self.fold()
        dropped = 0
        for path in [path for path in self._storage.files() if path.startswith("part-")]:
            if not (errors := self._read(path, ["error"]).column("error")).null_count < len(errors):
                continue
            table = self._read(path)
            wrong = table.filter(errors.is_valid())
            self._write(path, table.filter(errors.is_null()))
            self.keys.difference_update(q.key for q in questions_in(wrong))
            dropped += wrong.num_rows
        return dropped

    def _open(self, output: str, tenant: str) -> str:
        try:
            facts = json.loads(self._storage.read_unverified(_RUN).to_pybytes())
        except FileNotFoundError:
            if strangers := [path for path in self._storage.files() if not path.startswith("_questions-")]:
                raise BatchError(
                    f"{output} holds {strangers[0]}, and no answers of a batch run; choose a new or empty folder"
                ) from None
            facts = {"run": uuid.uuid4().hex, "tenant": tenant}
            self._storage.write(_RUN, json.dumps(facts).encode())
        if facts["tenant"] != tenant:
            raise BatchError(f"{output} holds answers of tenant {facts['tenant']!r}, not {tenant!r}; choose another")
        return str(facts["run"])

    def _read(self, path: str, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(pa.BufferReader(self._storage.read_unverified(path)), columns=columns)

    def _write(self, path: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self._storage.write(path, sink.getvalue())
