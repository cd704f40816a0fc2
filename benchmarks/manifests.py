"""What the documents of a memory cost the Router and the Catalog at every question on it.

    python -m benchmarks.manifests [--json FILE] [--questions 200]

Memories of as many slots, of 1 to 1,000 documents, are asked in turn through the real Router and Catalog, in one
process: what would cross to another one is pickled, and unpickled, as Ray does, and counted. Recaller, Retriever and
Generator answer at once, so what is left is the Router's own work from lookup to answer, which its event loop does
for one question at a time. Processor time, the median of all questions but each memory's first. The first reads the
manifest from storage, once for each version.

The baseline is what the Catalog and the Router did until November 2026 for each question, beside what they do now: the
whole manifest from the Catalog, `index_of` and the segment groups made anew, the whole index sent with each of a
question's four calls to the Retriever.
"""

import asyncio
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from statistics import median
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from ray import cloudpickle

from benchmarks.report import make_parser, report
from cluster.storage.durable import StoredFile
from generator_worker.messages import GenerateRequest, Generation, SourcesRead
from memory_worker.catalog.catalog import Catalog
from memory_worker.manifest import DocumentEntry, Manifest, MemoryKey, MemoryShape, SegmentEntry, now
from memory_worker.messages import Clue, KindDescription, MemorizerDescription, RecallRequest, RecallUsage
from memory_worker.models.fingerprint import fingerprint_of
from memory_worker.recall.groups import segment_groups
from memory_worker.storage.store import MemoryStore, head_path, passages_path, segment_path, source_path
from retrieval_worker.messages import Evidence, EvidenceRequest, Hit, Index, Passage, Ranking
from serving import api
from serving.config import load_profile
from serving.router import router as router_module
from serving.router.router import Router
from serving.router.versions import index_of

DOCUMENTS = (1, 10, 100, 1000)
SLOTS = 4000
CALLS_WITH_INDEX = 4  # a search for the question, one for its clues, the evidence ahead of the answer and after it
FINGERPRINT = "f" * 64
SHAPE = MemoryShape(layers=4, kv_heads=2, head_dim=32, dtype="bfloat16")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--questions", type=int, default=200, help="on each memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore(folder)
        manifests = [made_manifest(documents) for documents in DOCUMENTS]
        for manifest in manifests:
            store.publish(manifest)
        rows = asyncio.run(ask(folder, manifests, arguments.questions))
    first, last = rows[0], rows[-1]
    ratios = {
        "router_1000_over_1": last["Router ms"] / first["Router ms"],
        "bytes_1000_over_1": last["bytes from Catalog"] / first["bytes from Catalog"],
        "sent_1000_over_1": last["bytes to workers"] / first["bytes to workers"],
        "router_before_over_now_1000": (last["Router ms"] + last["before: Router ms more"]) / last["Router ms"],
    }
    report("manifests", rows, ratios, arguments.json)


async def ask(root: str, manifests: list[Manifest], questions: int) -> list[dict[str, Any]]:
    profile = load_profile("embedded")
    catalog = Counted(Catalog(root))
    workers = Counted(Workers())
    with mock.patch.object(router_module, "catalog", lambda *_: catalog):
        router = Router(profile, root, b"s" * 32, (), *[cast(Any, workers)] * 4)
    question = api.Question(question="How many times was the gate opened?", stream=False)
    spent: dict[str, list[float]] = {manifest.memory: [] for manifest in manifests}
    looked_up: dict[str, list[float]] = {manifest.memory: [] for manifest in manifests}
    rows: list[dict[str, Any]] = []
    for number in range(questions + 1):
        for manifest in manifests:
            catalog.seconds, catalog.got, workers.seconds, workers.sent = 0.0, 0, 0.0, 0
            began = time.thread_time()
            await router.answer("bench", [manifest.memory], None, question)
            if number:
                spent[manifest.memory].append(time.thread_time() - began - catalog.seconds - workers.seconds)
                looked_up[manifest.memory].append(catalog.seconds)
            if number == questions:
                rows.append({
                    "documents": len(manifest.documents),
                    "Router ms": median(spent[manifest.memory]) * 1e3,
                    "Catalog ms": median(looked_up[manifest.memory]) * 1e3,
                    "bytes from Catalog": catalog.got,
                    "bytes to workers": workers.sent,
                    **before(manifest, profile.memory.group_slots),
                })  # fmt: skip
    router._working.cancel()
    return rows


def before(manifest: Manifest, group_slots: int) -> dict[str, Any]:
    """What each question cost on top."""
    pickled = cloudpickle.dumps(manifest)
    index = index_of([manifest])

    def read() -> None:
        cloudpickle.loads(pickled)
        index_of([manifest])
        segment_groups([manifest], group_slots)
        for _ in range(CALLS_WITH_INDEX):
            cloudpickle.dumps(index)

    return {
        "before: Router ms more": measure(read) * 1e3,
        "before: Catalog ms more": measure(lambda: cloudpickle.dumps(manifest)) * 1e3,
        "before: bytes from Catalog": len(pickled),
        "before: bytes to workers more": CALLS_WITH_INDEX * len(cloudpickle.dumps(index)),
    }


def measure(work: Callable[[], object], times: int = 20) -> float:
    """Seconds of processor time, the median."""
    seconds = []
    for _ in range(times):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return median(seconds)


class Counted:
    """`handle.method.remote(…)`, with arguments and results pickled on the way; their making is the Router's own time.

    `seconds` are what the other side took: its work, unpickling what it is asked and pickling what it says.
    """

    def __init__(self, target: object) -> None:
        self._target = target
        self.seconds = 0.0
        self.sent = self.got = 0  # bytes

    def options(self, **_: object) -> "Counted":
        return self

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *asked, **named: self._call(name, cloudpickle.dumps((asked, named))))

    def _call(self, name: str, pickled: bytes) -> Any:
        self.sent += len(pickled)
        began = time.thread_time()
        asked, named = cloudpickle.loads(pickled)
        result = getattr(self._target, name)(*asked, **named)
        self.seconds += time.thread_time() - began
        return Items(self, result) if hasattr(result, "__aiter__") else self._reply(result)

    async def _reply(self, coroutine: Any) -> Any:
        began = time.thread_time()
        pickled = cloudpickle.dumps(await coroutine)
        self.seconds += time.thread_time() - began
        self.got += len(pickled)
        return cloudpickle.loads(pickled)


class Items:
    """A stream of them."""

    def __init__(self, counted: Counted, items: AsyncIterator[Any]) -> None:
        self._counted, self._items = counted, items

    def cancel(self) -> None:
        """There is nothing that goes on."""

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for item in self._items:
            pickled = cloudpickle.dumps(item)
            self._counted.got += len(pickled)
            yield cloudpickle.loads(pickled)


class Workers:
    """All pools, with an answer ready. They know an index by its name once they were given its parts."""

    def __init__(self) -> None:
        self._open: set[str] = set()
        passages = [Passage(n, "m", "document-00000", 400 * n, 400 * n + 400, "gate " * 80, 80) for n in range(8)]
        self._ranking = Ranking(tuple(Hit(passage, 0.5) for passage in passages), 1.0)

    async def describe(self) -> MemorizerDescription:
        kinds = {"beacon": KindDescription(64, (4,))}
        return MemorizerDescription("embedded", FINGERPRINT, 64, SHAPE, "beacon", cast(Any, kinds))

    async def recall(self, request: RecallRequest) -> AsyncIterator[Clue | RecallUsage]:
        yield Clue("span", "the gate was opened in March")
        yield RecallUsage(request.group.slots, 8)

    async def search(self, index: Index, texts: list[str]) -> list[Ranking] | None:
        return [self._ranking] * len(texts) if self._knows(index) else None

    async def prepare_evidence(self, index: Index, passages: tuple[int, ...]) -> bool | None:
        return True if self._knows(index) else None

    async def evidence(self, request: EvidenceRequest) -> list[Evidence] | None:
        return [] if self._knows(request.index) else None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[SourcesRead | Generation]:
        yield SourcesRead(tuple(range(len(request.sources))))
        yield Generation("Twice.", (), 700, 3, "stop")

    def _knows(self, index: Index) -> bool:
        if index.parts is not None:
            self._open.add(index.name)
        return index.name in self._open


def made_manifest(documents: int) -> Manifest:
    """Of files that are not there: nobody reads them here."""
    key = MemoryKey("bench", f"memory-{documents}", "v000001-00000000")

    def file(path: str, size: int) -> StoredFile:
        return StoredFile(path=path, size=size, digest=hashlib.sha256(path.encode()).hexdigest())

    def document(number: int) -> DocumentEntry:
        id, slots = f"document-{number:05d}", SLOTS // documents
        segment = SegmentEntry(tokens=4 * slots, slots=slots, files=(file(segment_path(key, id, 0, 0), 512 * slots),))
        return DocumentEntry(
            id=id,
            characters=16 * slots,
            source=file(source_path(key, id), 16 * slots),
            segments=(segment,),
            passages=file(passages_path(key, id), 4000),
            passage_count=1,
        )

    return Manifest(
        tenant=key.tenant,
        memory=key.memory,
        version=key.version,
        created=now(),
        model="embedded",
        fingerprint=fingerprint_of("beacon", FINGERPRINT),
        ratio=4,
        language="en",
        shape=SHAPE,
        head_tokens=tuple(range(30)),
        head=file(head_path(key), 512 * 30),
        documents=tuple(map(document, range(documents))),
    )


if __name__ == "__main__":
    main()
