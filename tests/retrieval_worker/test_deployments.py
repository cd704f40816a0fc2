"""The two deployments on a real local Serve, over a real novel."""

import asyncio
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from ray import serve

from cluster.pools.pools import PoolConfig
from cluster.storage.durable import DamagedFile, Storage, StorageGone
from retrieval_worker.config import EmbedderConfig, IndexConfig, PassageConfig, RetrievalConfig, SearchConfig
from retrieval_worker.errors import DamagedIndex, EmbedderFailed
from retrieval_worker.fusion import clue_weights, select_hits
from retrieval_worker.messages import (
    Embeddings,
    EvidenceRequest,
    Index,
    IndexedDocument,
    IndexPart,
    IndexProgress,
    IndexRequest,
    Ranking,
)
from retrieval_worker.retriever import Retriever, retrieval_applications
from tests.support.counting_embedder import CountingEmbedder
from tests.support.passage_files import described

BOOK = Path(__file__).parents[2].parent / "shared" / "data" / "books" / "pride-and-prejudice.txt"
GATE = "The gate was opened at noon by the dragon keeper."
ENGLISH = GATE + "\r\n\r\nBread costs two coins. 😀 Nobody sells e\u0301clairs.\n"
CHINESE = "城门在中午打开。守门人养了一条龙。\n\n" + "面包卖两个铜板，没有人卖蛋糕，" * 60
CONFIG = RetrievalConfig(
    embedder=EmbedderConfig(kind="minilm", dtype="bfloat16", device="cpu", batch_size=16),
    passages=PassageConfig(max_characters=800, overlap_characters=0),
    index=IndexConfig(cached_indexes_mib=1),
)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return Storage(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture(scope="module")
def retriever(storage, local_ray):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval_worker.retriever.Embedder", CountingEmbedder)
        _, application = retrieval_applications(CONFIG, PoolConfig(), storage_root=storage.root)
    return serve.run(application, name="retrieval", route_prefix=None)


async def add(retriever, storage, version: str, name: str, text: str) -> tuple[IndexPart, int, list[IndexProgress]]:
    """Indexes `text` as a document of `<tenant>/<memory>/<version>`; with it the number of its passages."""
    source = storage.write(f"{version}/source/{name}.txt", text.encode())
    request = IndexRequest(source, f"{version}/passages/{name}.safetensors")
    *progress, done = [item async for item in retriever.options(stream=True).index.remote(request)]
    assert isinstance(done, IndexedDocument)
    return IndexPart(version.split("/")[1], name, done.passages), done.passage_count, progress


async def make(retriever, storage, version: str, **texts: str) -> tuple[Index, int]:
    """An index of these documents, and the number of its passages."""
    made = [await add(retriever, storage, version, name, text) for name, text in texts.items()]
    return Index(tuple(part for part, _, _ in made)), sum(count for _, count, _ in made)


async def count_embedded() -> int:
    """Texts that the Embedder has embedded so far."""
    return sum(await serve.get_deployment_handle("Embedder", "retrieval").batches.remote())


async def best(retriever, index: Index, question: str):
    """The passage most like the question."""
    [found] = await retriever.search.remote(index, [question])
    return found.hits[0].passage


@pytest.fixture(scope="module")
async def small(retriever, storage):
    return (await make(retriever, storage, "t/m/small", en=ENGLISH, zh=CHINESE))[0]


async def test_progress_then_a_file_whose_passages_are_exact(retriever, storage):
    texts = {"en": ENGLISH * 40, "zh": CHINESE}
    parts, total = [], 0
    for name, text in texts.items():
        part, count, progress = await add(retriever, storage, "t/m/exact", name, text)
        done = [each.done_passages for each in progress]
        assert done[0] == 0 and done == sorted(done) and done[-1] == progress[-1].total_passages == count
        Storage(storage.root).read(part.passages)
        parts.append(part)
        total += count
    [ranking] = await retriever.search.remote(Index(tuple(parts)), ["dragon"], hits=10_000)
    assert len(ranking.hits) == total
    found = sorted((hit.passage for hit in ranking.hits), key=lambda passage: passage.id)
    assert [passage.id for passage in found] == list(range(total))
    for passage in found:
        assert passage.memory == "m" and texts[passage.document][passage.start : passage.end] == passage.text
        assert 0 < passage.tokens <= 254, "the embedder would cut it"


async def test_adding_replacing_and_deleting_a_document_embeds_only_what_is_new(retriever, storage):
    before, _ = await make(retriever, storage, "t/changing/v1", gate=GATE, bread="Bread costs two coins.")
    gate, bread = before.parts
    started = await count_embedded()
    harp, count, _ = await add(retriever, storage, "t/changing/v2", "harp", "A harp has forty-seven strings.")
    assert await count_embedded() - started == count == 1
    added = Index((gate, bread, harp))
    passage = await best(retriever, added, "How many strings does a harp have?")
    assert (passage.document, passage.id) == ("harp", 2)
    assert (await best(retriever, added, "When was the gate opened?")).id == 0
    bread_now, _, _ = await add(retriever, storage, "t/changing/v3", "bread", "Bread costs nine coins.")
    replaced = Index((gate, bread_now, harp))
    assert (await best(retriever, replaced, "What does bread cost?")).text == "Bread costs nine coins."
    assert (await best(retriever, added, "What does bread cost?")).text == "Bread costs two coins.", "immutable"
    [found] = await retriever.search.remote(Index((bread_now, harp)), ["When was the gate opened?"], hits=100)
    assert sorted(hit.passage.document for hit in found.hits) == ["bread", "harp"]


async def test_one_index_over_two_memories(retriever, storage):
    texts = {("english", "book"): "Wine is sold in barrels.\n\n" + ENGLISH, ("chinese", "book"): CHINESE}
    parts = [(await add(retriever, storage, f"t/{m}/v1", d, text))[0] for (m, d), text in texts.items()]
    index = Index(tuple(parts))
    answers = await retriever.search.remote(index, ["When was the gate opened?", "城门什么时候打开？"])
    assert [found.hits[0].passage.memory for found in answers] == ["english", "chinese"]
    passages = {hit.passage for found in answers for hit in found.hits}
    assert all(texts[p.memory, p.document][p.start : p.end] == p.text for p in passages)
    request = EvidenceRequest(index, tuple(p.id for p in passages), "城门什么时候打开？ When was the gate opened?", "")
    found = await retriever.evidence.remote(request)
    assert {each.memory for each in found} == {"english", "chinese"}
    assert all(texts[each.memory, each.document][each.start : each.end] == each.text for each in found)


async def test_an_index_of_nothing_finds_nothing(retriever):
    assert await retriever.search.remote(Index(()), ["anything"]) == [Ranking((), 0.0)]


async def test_what_an_earlier_run_wrote_is_taken_as_it_is(retriever, storage):
    text = ENGLISH * 20
    part, count, _ = await add(retriever, storage, "t/m/again", "d", text)
    started = await count_embedded()
    again, count_again, progress = await add(retriever, storage, "t/m/again", "d", text)
    assert (again, count_again) == (part, count) and await count_embedded() == started
    assert progress == [IndexProgress(count, count)]
    other, other_count, _ = await add(retriever, storage, "t/m/again", "d", GATE)
    assert other != part and await count_embedded() - started == other_count == 1, "another text"
    path = Path(storage.root) / other.passages.path
    data = bytearray(path.read_bytes())
    data[data.index(b"dragon")] ^= 1
    path.write_bytes(data)
    repaired, _, _ = await add(retriever, storage, "t/m/again", "d", GATE)
    assert repaired == other and await count_embedded() - started == 2, "damaged, so written anew"


async def test_two_tenants_with_the_same_text_share_nothing(retriever, storage):
    text, costs = "A lantern burns until midnight.", []
    for tenant in ("one", "two"):
        started = await count_embedded()
        part, _, _ = await add(retriever, storage, f"{tenant}/m/v1", "d", text)
        indexed = await count_embedded()
        await retriever.prepare_evidence.remote(Index((part,)), (0,))
        costs.append((indexed - started, await count_embedded() - indexed))
        await retriever.prepare_evidence.remote(Index((part,)), (0,))
        assert await count_embedded() - indexed == costs[-1][1], "of one's own it is kept"
    assert costs == [(1, 1), (1, 1)]


async def test_evidence_is_kept_over_versions(retriever, storage):
    old, _ = await make(retriever, storage, "t/kept/v1", a=GATE, b="Wine is sold in barrels.")
    await retriever.prepare_evidence.remote(old, (0, 1))
    started = await count_embedded()
    await retriever.prepare_evidence.remote(Index(old.parts[1:]), (0,))
    assert await count_embedded() == started


async def test_concurrent_searches(retriever, small):
    results = await asyncio.gather(
        *(retriever.search.remote(small, [q]) for q in ["When was the gate opened?", "城门什么时候打开？"] * 8)
    )
    assert [found.hits[0].passage.document for [found] in results] == ["en", "zh"] * 8


async def test_evidence_quotes_the_document(retriever, small):
    [found] = await retriever.search.remote(small, ["gate"], hits=1000)
    everything = tuple(hit.passage.id for hit in found.hits)
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


async def test_an_empty_document_has_an_empty_file(retriever, storage):
    part, count, progress = await add(retriever, storage, "t/m/empty", "nothing", " \n ")
    index = Index((part,))
    assert count == 0 and progress == [IndexProgress(0, 0)]
    assert await retriever.search.remote(index, ["anything", "else"]) == [Ranking((), 0.0)] * 2
    assert await retriever.evidence.remote(EvidenceRequest(index, (), "q", "a")) == []


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
async def test_damage_is_named_and_repaired_by_indexing_again(retriever, storage, harm):
    index, _ = await make(retriever, storage, f"t/m/{harm}", whole=GATE + harm, harmed=ENGLISH + harm)
    path = Path(storage.root) / index.parts[1].passages.path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(data if harm == "flip" else data[:100])
    for _ in range(2):  # a failure is not kept
        with pytest.raises(DamagedIndex, match=rf"t/m/{harm}/passages/harmed\.safetensors"):
            await retriever.search.remote(index, ["anything"])
    repaired, _, _ = await add(retriever, storage, f"t/m/{harm}", "harmed", ENGLISH + harm)
    assert repaired == index.parts[1], "the same text makes the same file"
    assert "two coins" in (await best(retriever, index, "What does bread cost?")).text


async def test_open_indexes_are_searched_while_storage_is_gone(retriever, storage):
    index, _ = await make(retriever, storage, "t/m/open", book=ENGLISH * 3)
    closed, _ = await make(retriever, storage, "t/m/closed", book=ENGLISH * 4)
    assert "gate" in (await best(retriever, index, "Who opened the gate?")).text
    root, away = Path(storage.root), Path(storage.root + "-away")
    root.rename(away)  # noqa: ASYNC240
    try:
        passage = await best(retriever, index, "What does bread cost?")
        assert "two coins" in passage.text
        request = EvidenceRequest(index, (passage.id,), "What does bread cost?", "")
        assert (await retriever.evidence.remote(request))[0].text == "Bread costs two coins."
        with pytest.raises(StorageGone, match="bring it back"):
            await retriever.search.remote(closed, ["anything"])
    finally:
        away.rename(root)  # noqa: ASYNC240
    assert "gate" in (await best(retriever, closed, "Who opened the gate?")).text


@pytest.mark.parametrize("harm", ["flip", "delete", "encoding"])
async def test_a_text_that_cannot_be_read_is_named(retriever, storage, harm):
    source = storage.write(f"t/m/text-{harm}/source/d.txt", b"\xff\xfe" if harm == "encoding" else ENGLISH.encode())
    path = Path(storage.root) / source.path
    if harm == "flip":
        path.write_bytes(path.read_bytes().replace(b"noon", b"moon"))
    elif harm == "delete":
        path.unlink()
    request = IndexRequest(source, f"t/m/text-{harm}/passages/d.safetensors")
    with pytest.raises(DamagedFile, match=rf"text-{harm}/source/d\.txt"):
        [item async for item in retriever.options(stream=True).index.remote(request)]
    assert not storage.exists(request.path)


class _Remote:
    """A deployment handle's method, answered by a function here."""

    def __init__(self, function):
        self.function = function

    async def remote(self, *args, **options):
        return self.function(*args, **options)


class _BrokenEmbedder:
    """A handle of an embedder whose half-precision arithmetic overflows."""

    describe = _Remote(described)
    count_tokens = _Remote(lambda texts: [5] * len(texts))
    embed = _Remote(lambda texts: Embeddings(np.full((len(texts), 64), np.nan, np.float32), None))


async def test_vectors_that_are_not_finite_are_not_written(storage):
    source = storage.write("t/m/nan/source/d.txt", ENGLISH.encode())
    broken = Retriever(CONFIG, storage.root, _BrokenEmbedder())
    with pytest.raises(EmbedderFailed, match=r"made-up.*dtype") as caught:
        [item async for item in broken.index(IndexRequest(source, "t/m/nan/passages/d.safetensors"))]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
    assert not storage.exists("t/m/nan/passages/d.safetensors")


@pytest.mark.skipif(not BOOK.exists(), reason=f"the novel, shared/data/books/{BOOK.name}, is not beside the checkout")
@pytest.mark.long
async def test_a_novel(retriever, storage, record_property):
    text = BOOK.read_bytes().decode()
    began = time.perf_counter()
    index, count = await make(retriever, storage, "t/m/novel", novel=text)
    seconds = time.perf_counter() - began
    record_property("index_seconds", seconds)
    question = "Who is the clergyman that proposes to Elizabeth?"
    clues = ["Mr. Collins made his proposal of marriage to Elizabeth.", "the rector of Hunsford"]
    rankings = await retriever.search.remote(index, [question, *clues])
    hits = select_hits(rankings, clue_weights(rankings, rankings[0].grounding), SearchConfig())
    assert any("Collins" in hit.passage.text for hit in hits)
    assert all(text[hit.passage.start : hit.passage.end] == hit.passage.text for hit in hits)
    began = time.perf_counter()
    for _ in range(20):
        await retriever.search.remote(index, [question])
    print(
        f"\nindexed {count} passages in {seconds:.1f} s; "
        f"a search takes {(time.perf_counter() - began) / 20 * 1000:.1f} ms"
    )
    ids = tuple(hit.passage.id for hit in hits)
    request = EvidenceRequest(index, ids, question, "Mr. Collins proposes to her.")
    for name in ("cold", "warm"):
        began = time.perf_counter()
        found = await retriever.evidence.remote(request)
        print(f"evidence {name}: {(time.perf_counter() - began) * 1000:.1f} ms")
    assert "Collins" in " ".join(each.text for each in found)
    assert all(text[each.start : each.end] == each.text for each in found)
