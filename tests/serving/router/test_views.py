"""A memory as HTTP shows it, in every state; and the index of several versions."""

from dataclasses import replace

import pytest

from cluster.storage.durable import Storage
from memory_worker.manifest import Manifest, MemoryKey
from memory_worker.messages import MemoryRecord
from serving.router.versions import index_of
from serving.router.views import memory_out, progress_out
from tests.support import manifests as made

KEY = made.KEY


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return made.memory(Storage(str(tmp_path)))


def record(**fields) -> MemoryRecord:
    return replace(MemoryRecord("acme", "book", KEY.version, "ready", "2026", 1), **fields)


def test_a_ready_memory(manifest: Manifest) -> None:
    shown = memory_out(record(), manifest)
    assert (shown.id, shown.version, shown.status, shown.tags, shown.job, shown.error) == (
        "book", KEY.version, "ready", ["tall"], None, None,
    )  # fmt: skip
    assert (shown.tokens, shown.slots, shown.passages, shown.bytes) == (16, 7, 2, 7 * made.SHAPE.slot_bytes)
    assert [(d.id, d.characters, d.tokens) for d in shown.documents] == [("a", 13, 8), ("b", 13, 8)]


def test_a_memory_in_the_making(manifest: Manifest) -> None:
    job = replace(made.job(KEY, documents=("a", "b"), title="T", tags=("x",)), done_tokens=2, total_tokens=9)
    shown = memory_out(record(status="memorizing", job=job), None)
    assert (shown.status, shown.title, shown.tags, shown.ratio, shown.slots) == ("memorizing", "T", ["x"], 4, 0)
    gist = replace(job, record=job.record.model_copy(update={"memory_kind": "gist"}))
    assert (shown.kind, memory_out(record(status="memorizing", job=gist), None).kind) == ("beacon", "gist")
    assert shown.job and shown.job.model_dump() == {
        "kind": "create", "state": "queued", "version": KEY.version, "documents": ["a", "b"], "done_tokens": 2,
        "total_tokens": 9,
    }  # fmt: skip


def test_a_change_shows_the_version_that_is_asked(manifest: Manifest) -> None:
    job = made.job(MemoryKey("acme", "book", "v000002-00000002"), manifest, ("c",))
    shown = memory_out(record(job=job), manifest)
    assert shown.version == KEY.version and [d.id for d in shown.documents] == ["a", "b"]
    assert shown.job and (shown.job.version, shown.job.kind) == ("v000002-00000002", "put")


def test_a_failed_memory() -> None:
    shown = memory_out(record(status="failed", error="disk full"), None)
    assert (shown.status, shown.error, shown.documents, shown.job) == ("failed", "disk full", [], None)


def test_progress_with_and_without_an_estimate(manifest: Manifest) -> None:
    job = replace(made.job(KEY), state="running", done_tokens=25, total_tokens=100)
    assert progress_out("memorizing", job, 5.0).seconds_left == 15.0
    assert progress_out("memorizing", job, 0.0).seconds_left is None
    assert progress_out("ready", made.job(KEY, manifest), 5.0).seconds_left is None, "its length is not known yet"


def test_the_index_names_every_document_of_every_memory(manifest: Manifest, tmp_path) -> None:
    other = made.memory(Storage(str(tmp_path)), MemoryKey("acme", "log", "v000001-00000003"), ("a",))
    index = index_of([manifest, other])
    assert index.name == f"acme/book/{KEY.version}+acme/log/v000001-00000003" and index.by_name.parts is None
    parts = index.parts
    assert parts is not None
    assert [(part.memory, part.document) for part in parts] == [("book", "a"), ("book", "b"), ("log", "a")]
    assert [part.passages for part in parts] == [d.passages for m in (manifest, other) for d in m.documents]


def test_a_pruned_memory_says_what_it_lost(manifest: Manifest) -> None:
    shares = (0.25, 0.75)  # of documents with as many tokens
    documents = tuple(
        document.model_copy(
            update={"segments": tuple(s.model_copy(update={"dropped": share}) for s in document.segments)}
        )
        for document, share in zip(manifest.documents, shares, strict=True)
    )
    pruned = manifest.model_copy(update={"kind": "pruned", "documents": documents})
    assert memory_out(record(), pruned).dropped == pytest.approx(0.5)
    assert memory_out(record(), manifest).dropped is None


def test_a_pruned_memory_says_whether_its_heads_share_their_slots(manifest: Manifest) -> None:
    assert memory_out(record(), manifest).head_budgets is None
    pruned = manifest.model_copy(update={"kind": "pruned"})
    assert memory_out(record(), pruned).head_budgets is False
    first, *others = pruned.documents
    shared = first.model_copy(
        update={"segments": tuple(s.model_copy(update={"head_budgets": True}) for s in first.segments)}
    )
    assert memory_out(record(), pruned.model_copy(update={"documents": (shared, *others)})).head_budgets is True
