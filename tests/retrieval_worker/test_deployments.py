"""The two deployments on a real local Serve, over a real novel."""

import asyncio
import logging
import shutil
import time
from pathlib import Path

import pytest
import ray
from ray import serve

from cluster.pools import PoolConfig
from cluster.storage import DamagedFile, Storage, StoredFile
from retrieval_worker.config import EmbedderConfig, IndexConfig, PassageConfig, RetrievalConfig
from retrieval_worker.errors import DamagedIndex
from retrieval_worker.fusion import fit, fuse
from retrieval_worker.messages import DocumentText, EvidenceRequest, Index, IndexProgress, IndexRequest
from retrieval_worker.retriever import retrieval_applications

BOOK = Path(__file__).parents[2].parent / "shared" / "data" / "books" / "pride-and-prejudice.txt"
GATE = "The gate was opened at noon by the dragon keeper."
ENGLISH = GATE + "\r\n\r\nBread costs two coins. 😀 Nobody sells e\u0301clairs.\n"
CHINESE = "城门在中午打开。守门人养了一条龙。\n\n" + "面包卖两个铜板，没有人卖蛋糕，" * 60
CONFIG = RetrievalConfig(
    embedder=EmbedderConfig(kind="minilm", dtype="bfloat16", device="cpu", batch_size=16),
    passages=PassageConfig(max_characters=800, overlap_characters=0),
    index=IndexConfig(cached_indexes=2),
)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return Storage(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture(scope="module")
def retriever(storage, tmp_path_factory):
    folder = Path("/tmp") / f"rw{time.time_ns() % 10**9}"
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        _temp_dir=str(folder),
        logging_level=logging.ERROR,
    )
    serve.start(http_options={"location": "NoServer"})
    _, application = retrieval_applications(CONFIG, PoolConfig(), storage_root=storage.root)
    yield serve.run(application, name="retrieval", route_prefix=None)
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


async def make(retriever, storage, version: str, **texts: str) -> tuple[Index, list[IndexProgress]]:
    documents = []
    for name, text in texts.items():
        path = f"t/m/{version}/source/{name}.txt"
        storage.write(path, text.encode())
        documents.append(DocumentText(name, path))
    request = IndexRequest(f"t/m/{version}", tuple(documents))
    *progress, index = [item async for item in retriever.options(stream=True).index.remote(request)]
    return index, progress


@pytest.fixture(scope="module")
async def small(retriever, storage):
    return (await make(retriever, storage, "small", en=ENGLISH, zh=CHINESE))[0]


async def test_progress_then_an_index_whose_passages_are_exact(retriever, storage):
    index, progress = await make(retriever, storage, "exact", en=ENGLISH * 40, zh=CHINESE)
    texts = {"en": ENGLISH * 40, "zh": CHINESE}
    done = [each.done_passages for each in progress]
    assert done == sorted(done) and done[-1] == progress[-1].total_passages == index.passage_count
    [[hits]] = await retriever.search.remote(index, ["dragon"], hits=10_000)
    assert len(hits) == index.passage_count
    found = sorted((hit.passage for hit in hits), key=lambda passage: passage.id)
    assert [passage.id for passage in found] == list(range(index.passage_count))
    for passage in found:
        assert texts[passage.document][passage.start : passage.end] == passage.text
        assert 0 < passage.tokens <= 254, "the embedder would cut it"
    read = Storage(storage.root)
    for file in (index.passages, *index.files):
        read.read(file)


async def test_concurrent_searches(retriever, small):
    results = await asyncio.gather(
        *(retriever.search.remote(small, [q]) for q in ["When was the gate opened?", "城门什么时候打开？"] * 8)
    )
    assert [hits[0].passage.document for [[hits]] in results] == ["en", "zh"] * 8


async def test_evidence_quotes_the_document(retriever, small):
    everything = tuple(range(small.passage_count))
    await retriever.prepare_evidence.remote(small, everything)
    request = EvidenceRequest(small, everything, "Who opened the gate?", "The dragon keeper did.")
    found = await retriever.evidence.remote(request)
    assert found[0].text == GATE
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    texts = {"en": ENGLISH, "zh": CHINESE}
    for each in found:
        assert texts[each.document][each.start : each.end] == each.text
    assert len({(each.document, each.start) for each in found}) == len(found) == CONFIG.search.evidence
    alone = await retriever.evidence.remote(EvidenceRequest(small, everything, "What does bread cost?", ""))
    assert alone[0].text == "Bread costs two coins."


async def test_an_empty_document_has_an_empty_index(retriever, storage):
    index, progress = await make(retriever, storage, "empty", nothing=" \n ")
    assert index.passage_count == 0 and progress[-1].total_passages == 0
    assert await retriever.search.remote(index, ["anything", "else"]) == [[[]], [[]]]
    assert await retriever.evidence.remote(EvidenceRequest(index, (), "q", "a")) == []


@pytest.mark.parametrize("harm", ["flip", "delete"])
async def test_a_damaged_index_is_rebuilt_from_its_passages(retriever, storage, harm):
    index, _ = await make(retriever, storage, f"harm-{harm}", en=ENGLISH + harm)
    path = Path(storage.root) / index.files[0].path
    if harm == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    [[hits]] = await retriever.search.remote(index, ["When was the gate opened?"])
    assert "gate was opened" in hits[0].passage.text


async def test_damaged_passages_are_named(retriever, storage, small):
    gone = Index(StoredFile("t/m/gone/passages.parquet", 10, "0" * 64), small.files, small.passage_count)
    for _ in range(2):  # a failure is not kept
        with pytest.raises(DamagedIndex, match=r"t/m/gone/passages\.parquet"):
            await retriever.search.remote(gone, ["anything"])


async def test_a_missing_document_is_named(retriever):
    request = IndexRequest("t/m/none", (DocumentText("d", "t/m/none/source/d.txt"),))
    with pytest.raises(DamagedFile, match=r"source/d\.txt"):
        [item async for item in retriever.options(stream=True).index.remote(request)]


@pytest.mark.skipif(not BOOK.exists(), reason="the novel is not beside this checkout")
async def test_a_novel(retriever, storage, record_property):
    text = BOOK.read_bytes().decode()
    began = time.perf_counter()
    index, _ = await make(retriever, storage, "novel", novel=text)
    seconds = time.perf_counter() - began
    record_property("index_seconds", seconds)
    question = "Who is the clergyman that proposes to Elizabeth?"
    clues = ["Mr. Collins made his proposal of marriage to Elizabeth.", "the rector of Hunsford"]
    rankings = [r for found in await retriever.search.remote(index, [question, *clues]) for r in found]
    kept = fit(fuse(rankings, 60), 5, 2048)
    assert any("Collins" in hit.passage.text for hit in kept)
    assert all(text[hit.passage.start : hit.passage.end] == hit.passage.text for hit in kept)
    began = time.perf_counter()
    for _ in range(20):
        await retriever.search.remote(index, [question])
    print(
        f"\nindexed {index.passage_count} passages in {seconds:.1f} s; "
        f"a search takes {(time.perf_counter() - began) / 20 * 1000:.1f} ms"
    )
    ids = tuple(hit.passage.id for hit in kept)
    request = EvidenceRequest(index, ids, question, "Mr. Collins proposes to her.")
    for name in ("cold", "warm"):
        began = time.perf_counter()
        found = await retriever.evidence.remote(request)
        print(f"evidence {name}: {(time.perf_counter() - began) * 1000:.1f} ms")
    assert "Collins" in " ".join(each.text for each in found)
    assert all(text[each.start : each.end] == each.text for each in found)
