"""The Embedder's health is that of its model: what raises or hangs is told, what is only slow is not."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from retrieval_worker import embedder as module
from retrieval_worker.config import EmbedderConfig
from retrieval_worker.embedder import Embedder
from retrieval_worker.messages import Embeddings


class Model:
    """Embeds at once, until `before` is set."""

    query_prompt = passage_prompt = ""

    def __init__(self) -> None:
        self.calls = 0
        self.before: Callable[[], object] = lambda: None

    def encode(self, texts: Sequence[str]) -> Embeddings:
        self.before()
        self.calls += 1
        return Embeddings(np.zeros((len(texts), 4), np.float32), None)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setattr(module, "load_embedder", lambda config: model)
    monkeypatch.setattr(module, "_CHECK_S", 0.02)
    return model


def make() -> Embedder:
    return Embedder(EmbedderConfig(kind="minilm", batch_wait_ms=0, batch_size=1))


async def check(embedder: Embedder, times: int) -> None:
    for _ in range(times):
        await embedder.check_health()


async def test_a_check_computes_unless_something_else_was_computed_since_the_last(model):
    embedder = make()
    await check(embedder, 4)
    assert model.calls > 2
    await embedder.embed(["a question"])
    seen = model.calls
    await check(embedder, 1)
    assert model.calls == seen


async def test_a_model_that_raises_is_not_healthy(model):
    def lose() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    embedder = make()
    await check(embedder, 2)
    model.before = lose
    with pytest.raises(RuntimeError, match="CUDA error"):
        await check(embedder, 3)
    with pytest.raises(RuntimeError, match="CUDA error"):
        await check(embedder, 1)


async def test_a_model_that_hangs_is_not_healthy(model, monkeypatch):
    monkeypatch.setattr(module, "_STILL_S", 0.2)
    go_on = threading.Event()
    embedder = make()
    model.before = go_on.wait
    try:
        with pytest.raises(TimeoutError, match="computed nothing"):
            await check(embedder, 1000)
    finally:
        go_on.set()


async def test_a_model_that_is_busy_for_longer_than_a_check_waits_is_healthy(model):
    go_on = threading.Event()
    embedder = make()
    await check(embedder, 2)
    model.before = go_on.wait
    question = asyncio.create_task(embedder.embed(["a long batch"]))
    await check(embedder, 5)
    assert not question.done()
    go_on.set()
    await question
    await check(embedder, 2)
