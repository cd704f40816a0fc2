"""Files that anybody may have made: what is read is what was written, or a `DamagedMemory`, and nothing else."""

import copy
import hashlib
import io
import json
import random
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, Phase, configuration, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from benchmarks.support.stored_memories import in_little_memory
from cluster.storage.durable import DamagedFile, Storage, StoredFile
from memory_worker.errors import DamagedMemory, MemoryNotFound
from memory_worker.manifest import Document, DocumentEntry, JobRecord, Manifest, MemoryKey, MemoryShape, SegmentEntry
from memory_worker.storage.segments import Segment, write_slots
from memory_worker.storage.store import MemoryStore

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "memorag-hypothesis")  # not in the source tree
examples = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

KEY = MemoryKey("acme", "book", "v000001-0123abcd")
SHAPE = MemoryShape(layers=2, kv_heads=1, head_dim=4, dtype="bfloat16")
ENTRY = StoredFile(path=f"{KEY.path}/data", size=10, digest="0" * 64)
MANIFEST = Manifest(
    tenant=KEY.tenant,
    memory=KEY.memory,
    version=KEY.version,
    created="2026-01-01T00:00:00.000+00:00",
    tags=("a",),
    model="tiny",
    fingerprint="f" * 64,
    ratio=4,
    language="en",
    shape=SHAPE,
    head_tokens=(1, 2),
    head=ENTRY,
    documents=(
        DocumentEntry(
            id="one",
            characters=4,
            source=ENTRY,
            segments=(SegmentEntry(tokens=4, slots=1, files=(ENTRY,)),),
            passages=ENTRY,
            passage_count=1,
        ),
    ),
)
JOB = JobRecord(id="1", documents=(Document(id="one", characters=4, source=ENTRY),), ratio=4, language="en")
BAD_PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "acme/../../secret",
    "acme/./book",
    "acme//book",
    "acme/book/",
    "..",
    ".",
    "",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\ud800",
    "a" * 201,
    "a/" * 600 + "a",
]
STRANGE = st.one_of(
    st.sampled_from([*BAD_PATHS, None, True, 0, -1, 2**63, 10**400, 1.5, float("nan"), float("inf"), [], {}]),
    st.integers(1, 2000).map(lambda depth: json.loads("[" * min(depth, 400) + "]" * min(depth, 400))),
    st.integers(),
    st.text(max_size=20),
)


@st.composite
def changed_bytes(draw: Any, data: bytes) -> bytes:
    """`data` with some bytes flipped, cut off, put in, or left out."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "insert", "leave out"])):
            case "flip" if changed:
                changed[place] ^= draw(st.integers(1, 255))
            case "cut":
                del changed[place:]
            case "insert":
                changed[place:place] = draw(st.binary(min_size=1, max_size=8))
            case _:
                del changed[place : place + draw(st.integers(1, 8))]
    return bytes(changed)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something lies in a JSON document: the keys that lead to it."""
    if path:
        yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*path, key))


@st.composite
def changed_json(draw: Any, content: dict[str, Any]) -> dict[str, Any]:
    """`content` with values replaced, keys left out or added, items repeated."""
    changed = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(changed))
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        parent: Any = changed
        for step in above:
            parent = parent[step]
        match draw(st.sampled_from(["replace", "replace", "replace", "leave out", "add", "repeat"])):
            case "replace":
                parent[key] = draw(STRANGE)
            case "leave out":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=5))] = draw(STRANGE)
            case _ if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
    return changed


def sealed(content: Any) -> bytes:
    """As the store seals a manifest; anybody can."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({"sha256": hashlib.sha256(canonical).hexdigest(), "manifest": content}).encode()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A storage root with a secret beside it."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "secret").write_text("not to be read")
    (folder / "root").mkdir()
    return folder / "root"


def put(root: Path, name: str, data: bytes) -> MemoryStore:
    """A store in which the version has that file and no other; written without its durability, to be fast."""
    path = root / KEY.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return MemoryStore(str(root))


def test_what_these_tests_change_is_whole(root: Path) -> None:
    assert put(root, "manifest.json", sealed(MANIFEST.model_dump(mode="json"))).read_manifest(KEY) == MANIFEST
    assert put(root, "job.json", JOB.model_dump_json().encode()).job(KEY) == JOB
    assert Segment(pa.py_buffer(SEGMENT), "some/file").slots == 20


@examples
@given(data=changed_bytes(sealed(MANIFEST.model_dump(mode="json"))))
def test_a_manifest_with_other_bytes_is_the_one_published_or_damaged(root: Path, data: bytes) -> None:
    with suppress(DamagedMemory, MemoryNotFound):
        assert put(root, "manifest.json", data).read_manifest(KEY) == MANIFEST


@examples
@given(content=changed_json(MANIFEST.model_dump(mode="json")))
def test_a_manifest_that_somebody_sealed_names_only_files_below_the_root(root: Path, content: Any) -> None:
    store = put(root, "manifest.json", sealed(content))
    try:
        manifest = store.read_manifest(KEY)
    except DamagedMemory:
        return
    for file in manifest.files:
        assert (root / file.path).resolve().is_relative_to(root) and file.size >= 0
        with pytest.raises(DamagedFile):
            store.storage.read(file)
    store.discard(KEY)
    assert (root.parent / "secret").exists()


@pytest.mark.parametrize("depth", [500, 900, 980, 990, 1000, 5000, 100_000])
def test_a_manifest_nested_too_deep_is_damaged(root: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    store = put(root, "manifest.json", f'{{"sha256": "0", "manifest": {{"format": 3, "title": {deep}}}}}'.encode())
    with pytest.raises(DamagedMemory):
        store.read_manifest(KEY)


@examples
@given(content=changed_json(JOB.model_dump(mode="json")), data=changed_bytes(JOB.model_dump_json().encode()))
def test_a_job_is_a_job_or_damaged(root: Path, content: Any, data: bytes) -> None:
    for written in (json.dumps(content).encode(), data):
        try:
            job = put(root, "job.json", written).job(KEY)
        except DamagedMemory:
            continue
        assert isinstance(job, JobRecord)
        assert all((root / document.source.path).resolve().is_relative_to(root) for document in job.documents)


@pytest.mark.parametrize("path", BAD_PATHS)
def test_no_path_leaves_the_root(root: Path, path: str) -> None:
    storage = Storage(str(root))
    with pytest.raises(ValidationError):
        TypeAdapter(StoredFile).validate_python({"path": path, "size": 0, "digest": "0" * 64})
    attempts = (
        lambda: storage.read(StoredFile(path, 0, "")),
        lambda: storage.write(path, b""),
        lambda: storage.delete(path),
        lambda: storage.delete_folder(path),
        lambda: storage.exists(path),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match="is not a path below the storage root"):
            attempt()


@pytest.mark.parametrize(
    "field", [{"size": -1}, {"more": 1}, {"digest": "0" * 63}, {"digest": "G" * 64}, {"digest": "0" * 64 + "\n"}]
)
def test_a_record_that_no_file_can_have_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(StoredFile).validate_python(asdict(ENTRY) | field)


def segment_file() -> bytes:
    sink = io.BytesIO()
    slots = torch.arange(2 * 20 * 4).reshape(2, 1, 20, 4).to(torch.bfloat16)
    write_slots(sink, SHAPE, [(slots, slots)])
    return sink.getvalue()


SEGMENT = segment_file()


def open_segment(data: bytes) -> None:
    try:
        segment = Segment(pa.py_buffer(data), "some/file")
    except DamagedMemory:
        return
    keys, values = segment.tensors()
    assert keys.shape == values.shape and keys.shape[2] == segment.slots
    assert keys.nbytes + values.nbytes <= len(data)


@examples
@given(data=changed_bytes(SEGMENT))
def test_a_segment_is_a_segment_or_damaged(data: bytes) -> None:
    open_segment(data)


def with_strange_number(choice: random.Random) -> bytes:
    """The segment file with numbers of its header, or the length of that, replaced by others."""
    data = SEGMENT
    for _ in range(choice.randint(1, 3)):
        header = data[8 : 8 + int.from_bytes(SEGMENT[:8], "little")]
        number = choice.choice([0, 1, -1, 7, 8, 1 << 20, 1 << 30, 1 << 62, (1 << 63) - 1, 1 << 64, 10**400, 0.5])
        found = choice.choice([*re.finditer(rb"\d+", header)])
        header = header[: found.start()] + str(number).encode() + header[found.end() :]
        length = len(header) if choice.random() < 0.9 else choice.randrange(1 << 64)
        data = length.to_bytes(8, "little") + header + data[8 + int.from_bytes(SEGMENT[:8], "little") :]
    return data


def test_no_segment_kills_the_process_or_takes_its_memory() -> None:
    def open_strange_ones() -> None:
        for seed in range(3000):
            open_segment(with_strange_number(random.Random(seed)))

    assert in_little_memory(open_strange_ones)
