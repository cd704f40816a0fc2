"""Recalls over memories of a model that transformers reads for the Memorizer.

`engine_scenarios` runs them, and `test_stock.py` says what is right.
"""

import asyncio
from pathlib import Path
from typing import Any

from benchmarks.support.recall_engine import Reference, connector_config, engine
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.storage.store import MemoryStore
from tests.support.kind_scenarios import asked, plain
from tests.support.kinds_of_memory import NOTE, TWIN, config_for, memorized


def stock(model: Path, store: MemoryStore) -> dict[str, Any]:
    """With an engine of its own."""
    memorizer, reference = Memorizer(config_for(model), store.storage.root), Reference(model)
    made = {
        kind: {
            name: asyncio.run(memorized(memorizer, store, f"{model.name}-{kind}-{name}", kind, {name: text}))
            for name, text in (("note", NOTE), ("twin", TWIN))
        }
        for kind in ("full", "gist")
    }
    with engine(model, connector_config(store, fingerprint=memorizer._description.fingerprint)) as llm:
        seen: dict[str, Any] = {kind: asked(llm, store, reference, memories) for kind, memories in made.items()}
        return seen | {"plain": plain(llm, memorizer, reference, made["full"]["note"])}
