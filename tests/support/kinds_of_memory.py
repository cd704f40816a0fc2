"""One memory of each kind, made by a real Memorizer: what the contract tests and their engine scenarios share."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from cluster.config import EngineConfig
from cluster.planning.costs import MemoryKind
from memory_worker.config import MemorizeConfig, MemoryConfig
from memory_worker.manifest import DocumentEntry, Manifest, MemoryKey, now
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.messages import MemorizeRequest, MemorizeResult
from memory_worker.storage.store import MemoryStore
from tests.support.memorizing import steps_until

RATIOS: dict[MemoryKind, int] = {"beacon": 8, "full": 1, "gist": 32, "pruned": 4}

_LINE = "The keeper of light {} wrote down nineteen ships, {} storms and the name of every sailor he drew ashore.\n"
NOTE = "".join(_LINE.format(n, n * n) for n in range(20))
TWIN = "".join(_LINE.format(n + 3, n * 7) for n in range(20))
STORY = "".join(_LINE.format(n, n % 17) for n in range(190))  # more than one window of 4096 tokens


def config_for(model: Path, **memorize: Any) -> MemoryConfig:
    """In windows of 512 tokens; segments of 2048, or of one gist's window."""
    settings = {"dtype": "float32", "threads": 1, "device": "cpu", "checkpoint_windows": 1, "segment_tokens": 2048}
    return MemoryConfig(
        engine=EngineConfig(model=str(model), dtype="float32"), memorize=MemorizeConfig(**(settings | memorize))
    )


def stock_model(embedded: Path, folder: Path) -> Path:
    """The model `embedded` without its beacon weights, made in `folder`: a checkpoint as hubs have them."""
    stock = folder / "stock"
    stock.mkdir()
    for file in embedded.iterdir():
        if file.suffix == ".json":
            content = json.loads(file.read_text("utf-8"))
            kept = {key: value for key, value in content.items() if not key.startswith("beacon")}
            (stock / file.name).write_text(json.dumps(kept), "utf-8")
    weights = {
        name: weight for name, weight in load_file(embedded / "model.safetensors").items() if "beacon" not in name
    }
    save_file(weights, stock / "model.safetensors", metadata={"format": "pt"})
    return stock


def request_for(store: MemoryStore, memory: str, kind: MemoryKind, texts: dict[str, str]) -> MemorizeRequest:
    """To make a new version of `texts`, which are written."""
    key = store.new_version("acme", memory)
    documents = tuple(store.write_source(key, name, text) for name, text in texts.items())
    return MemorizeRequest(key, documents, RATIOS[kind], "en", kind=kind)


def manifest_of(store: MemoryStore, request: MemorizeRequest, result: MemorizeResult) -> Manifest:
    """The published manifest of what was made; it has no passages."""
    key: MemoryKey = request.key
    nothing = store.storage.write(f"{key.path}/nothing", b"")
    manifest = Manifest(
        tenant=key.tenant,
        memory=key.memory,
        version=key.version,
        created=now(),
        kind=request.kind,
        model=result.model,
        fingerprint=result.fingerprint,
        ratio=request.ratio,
        language=request.language,
        shape=result.shape,
        head_tokens=result.head_tokens,
        head=result.head,
        documents=tuple(
            DocumentEntry(
                **dict(document),
                segments=segments,
                passages=nothing,
                passage_count=0,
            )
            for document, segments in zip(request.documents, result.segments, strict=True)
        ),
    )
    store.publish(manifest)
    return manifest


async def memorized(
    memorizer: Memorizer, store: MemoryStore, memory: str, kind: MemoryKind, texts: dict[str, str]
) -> Manifest:
    """A published memory of `texts`."""
    request = request_for(store, memory, kind, texts)
    *_, result = await steps_until(memorizer, request)
    assert isinstance(result, MemorizeResult)
    return manifest_of(store, request, result)
