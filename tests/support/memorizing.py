"""A memorize job that can be run here, or in a process that is to be killed.

`python -m tests.support.memorizing MODEL STORAGE VERSION` prints a line for each step.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

from cluster.config import EngineConfig
from memory_worker.config import MemorizeConfig, MemoryConfig
from memory_worker.manifest import Document, MemoryKey
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.messages import MemorizeProgress, MemorizeRequest, MemorizeResult
from memory_worker.storage.store import MemoryStore, source_path

# In windows of 512 tokens: less than one, some and a rest, next to nothing, several segments, exactly one, a rest.
TEXTS = {
    "short": "The fog came down before noon, and nobody rang the bell.\n" * 9,
    "middle": "Nineteen ships were counted from the tower that day.\n" * 70,
    "dot": ".",
    "long": "The lighthouse keeper wrote every name into the great book, twice where he was not sure.\n" * 120,
    "last": "山上的风很大，她还是把灯点亮了。" * 20,
}
SEGMENT_TOKENS = 1536


def config_for(model: Path, **memorize: Any) -> MemoryConfig:
    settings = {"dtype": "float32", "threads": 1, "device": "cpu", "checkpoint_windows": 2}
    settings |= {"segment_tokens": SEGMENT_TOKENS, **memorize}
    return MemoryConfig(engine=EngineConfig(model=str(model)), memorize=MemorizeConfig(**settings))


def stored_request(store: MemoryStore, key: MemoryKey, ratio: int = 8) -> MemorizeRequest:
    """For the version's sources, which are written if they are not there."""
    documents = []
    for name, text in TEXTS.items():
        if not store.storage.exists(source_path(key, name)):
            store.write_source(key, name, text)
        source = store.storage.record(source_path(key, name))
        documents.append(Document(id=name, characters=len(text), source=source))
    return MemorizeRequest(key, tuple(documents), ratio, "en")


async def steps_until(
    memorizer: Memorizer, request: MemorizeRequest, stop: int | None = None
) -> list[MemorizeProgress | MemorizeResult]:
    """All steps, or the first `stop`: the job is then given up."""
    steps, seen = memorizer.memorize(request), []
    async for step in steps:
        seen.append(step)
        if len(seen) == stop:
            break
    await steps.aclose()
    return seen


def files_of(result: MemorizeResult | MemorizeProgress, key: MemoryKey) -> list[tuple[str, int, str]]:
    """Name within the version, size and digest of every file, in order."""
    assert isinstance(result, MemorizeResult)
    files = [result.head, *(f for segments in result.segments for segment in segments for f in segment.files)]
    return [(file.path.removeprefix(key.path), file.size, file.digest) for file in files]


async def _main(model: str, root: str, version: str) -> None:
    store = MemoryStore(root)
    memorizer = Memorizer(config_for(Path(model)), root)
    async for step in memorizer.memorize(stored_request(store, MemoryKey("acme", "book", version))):
        print(step, flush=True)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
