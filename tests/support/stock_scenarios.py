"""Recalls over memories of models that transformers reads for the Memorizer, in a process of its own; prints JSON.

`test_stock.py` runs it and says what is right: `python -m tests.support.stock_scenarios STORAGE CHECKPOINT …`.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.support.recall_engine import IN_PROCESS

os.environ.update(IN_PROCESS)

from benchmarks.support.recall_engine import Reference, connector_config, engine, ray_of_its_own
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.storage.store import MemoryStore
from tests.support.kind_scenarios import asked, plain
from tests.support.kinds_of_memory import NOTE, TWIN, config_for, memorized


def main(storage: Path, *checkpoints: Path) -> None:
    store = MemoryStore(str(storage))
    seen: dict[str, Any] = {}
    with ray_of_its_own():
        for model in checkpoints:
            memorizer, reference = Memorizer(config_for(model), store.storage.root), Reference(model)
            made = {
                kind: {
                    name: asyncio.run(memorized(memorizer, store, f"{model.name}-{kind}-{name}", kind, {name: text}))
                    for name, text in (("note", NOTE), ("twin", TWIN))
                }
                for kind in ("full", "gist")
            }
            fingerprint = memorizer._description.fingerprint
            with engine(model, connector_config(store, fingerprint=fingerprint)) as llm:
                seen[model.name] = {kind: asked(llm, store, reference, memories) for kind, memories in made.items()}
                seen[model.name]["plain"] = plain(llm, memorizer, reference, made["full"]["note"])
    print("SEEN", json.dumps(seen))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
