"""Bytes moved to the node that answers, per question: cold from storage, cold from another node, and warm.

    python -m benchmarks.moved [--json FILE] [--slots 16384]

Two Ray nodes on this machine, each with its keeper. A question asks its node's keeper for the memory before the engine
reads it; what is counted is what the keeper brought to its node for that, and how long the question waited for it. The
floor is the memory's own slots once per node, and nothing from then on:

    storage        the first question on a memory anywhere: its file is read, verified and put
    other node     the first question on the second node, while the first holds the memory
    one document   the first question on a new version of which one document of eight differs
    warm           every later question

Slots are random, in the shape of the embedded model. On one machine both nodes' object stores share its memory, so the
times of *other node* have a copy through loopback in them and no network.
"""

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import make_parser, report
from benchmarks.support.stored_memories import store_memory, whole
from memory_worker.manifest import Manifest, MemoryKey, MemoryShape
from memory_worker.storage.store import MemoryStore

SHAPE = MemoryShape(layers=4, kv_heads=2, head_dim=32, dtype="bfloat16")
MEMORIES, DOCUMENTS, QUESTIONS = 6, 8, 16
KEEPER_BYTES = 2**30


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--slots", type=int, default=16384, help="of each memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, two_nodes() as nodes:
        store = MemoryStore(folder)
        before, after = zip(*(versions(store, i, arguments.slots) for i in range(MEMORIES)), strict=True)
        rows = ask(store, nodes, before, after)
    ratios = {f"{row['question']}, bytes over slots": row["moved over slots"] for row in rows}
    report("moved", rows, ratios, arguments.json)


@contextmanager
def two_nodes() -> Iterator[tuple[str, str]]:
    """Ids of two nodes; this process is on the first."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 2**30}
    with tempfile.TemporaryDirectory(prefix="moved", dir="/tmp") as folder:
        os.environ["RAY_TMPDIR"] = folder  # else every Ray on this machine would find this cluster
        Path(folder, "ray").mkdir()
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
            other = cluster.add_node(**node)
            cluster.wait_for_nodes()
            yield ray.get_runtime_context().get_node_id(), other.node_id
        finally:
            ray.shutdown()
            cluster.shutdown()


def versions(store: MemoryStore, number: int, slots: int) -> tuple[Manifest, Manifest]:
    """A memory of some documents, and its next version, in which the last of them is another."""
    share, seed = slots // DOCUMENTS, 1 + number * (DOCUMENTS + 1)
    documents = {f"document-{i}": (share, seed + i) for i in range(DOCUMENTS)}
    changed = documents | {f"document-{DOCUMENTS - 1}": (share, seed + DOCUMENTS)}
    made = [
        store_memory(store, MemoryKey("bench", f"memory-{number}", f"v{version:06d}-00000000"), each, shape=SHAPE)
        for version, each in enumerate((documents, changed), 1)
    ]
    return made[0], made[1]


def ask(
    store: MemoryStore, nodes: tuple[str, str], before: tuple[Manifest, ...], after: tuple[Manifest, ...]
) -> list[dict[str, Any]]:
    """A row for each kind of question; memories are asked one after another."""
    from memory_worker.keeper.keeper import keeper_on

    namespace = f"moved-{uuid.uuid4().hex}"
    first, second = (keeper_on(node, store.storage.root, KEEPER_BYTES, namespace) for node in nodes)
    return [
        _row("storage", first, before, of=before),
        _row("other node", second, before, of=before),
        _row("one document", first, after, of=after),
        _row("warm", first, before * (QUESTIONS // 2) + after * (QUESTIONS // 2), of=before),
        _row("warm, other node", second, before * QUESTIONS, of=before),
    ]


def _row(question: str, keeper: Any, asked: tuple[Manifest, ...], of: tuple[Manifest, ...]) -> dict[str, Any]:
    import ray

    seconds = []
    before = ray.get(keeper.stats.remote())
    for manifest in asked:
        group = whole(manifest)
        began = time.perf_counter()
        kept = ray.get(keeper.chunks.remote(group))
        seconds.append(time.perf_counter() - began)
        assert kept.total_slots == manifest.slots, kept
    after = ray.get(keeper.stats.remote())
    moved = (after.moved_bytes - before.moved_bytes) / len(asked)
    return {
        "question": question,
        "questions": len(asked),
        "bytes of the memory": of[0].slots * SHAPE.slot_bytes,
        "bytes moved a question": moved,
        "moved over slots": moved / (of[0].slots * SHAPE.slot_bytes),
        "files from storage": after.loads - before.loads,
        "files from the other node": after.pulls - before.pulls,
        "waited, median (ms)": median(seconds) * 1e3,
    }


if __name__ == "__main__":
    main()
