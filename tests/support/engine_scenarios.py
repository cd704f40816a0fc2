"""Runs real engines over real memories in a process of its own, and prints as JSON what was seen.

`tests/memory_worker/conftest.py` runs it, once, for all who ask what an engine makes of a memory:
`python -m tests.support.engine_scenarios FOLDER MODEL ADDRESS [long]`. Each engine takes a while to start: with `long`
those run that only `make test-long` has. ADDRESS is that of the Ray that this process is to use.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.support.recall_engine import IN_PROCESS

os.environ.update(IN_PROCESS)

import ray

from benchmarks.support.recall_engine import NAMESPACE, Reference, connector_config, engine
from memory_worker.catalog.actor import end_actors
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.storage.store import MemoryStore
from tests.support.kind_scenarios import kinds
from tests.support.kinds_of_memory import config_for
from tests.support.recall_scenarios import GOLDENS, Recalls, goldens, qwen3
from tests.support.stock_models import write_model
from tests.support.stock_scenarios import stock


def main(folder: Path, model: Path, address: str, long: bool) -> None:
    store = MemoryStore(str(folder / "store"))
    golden = sorted(GOLDENS.iterdir()) if GOLDENS.exists() else []
    ray.init(address=address, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
    recalls = Recalls(model, store)
    seen: dict[str, Any] = {}
    if long:
        seen["recall"] = recalls.long() | {"qwen3": qwen3(folder / "qwen3", model, store)}
    else:
        memorizer = Memorizer(config_for(model), store.storage.root)
        with engine(model, connector_config(store, fingerprint=recalls.fingerprint)) as llm:
            seen["recall"] = recalls.short(llm)
            seen["kinds"] = kinds(llm, store, memorizer, Reference(model))
        seen["recall"]["tight"] = recalls.tight()
    family = "phi3" if long else "glm"
    seen["stock"] = {family: stock(write_model(folder / family, family, model), store)}
    seen["recall"]["goldens"] = {path.name: goldens(path, store) for path in (golden[1:] if long else golden[:1])}
    end_actors(NAMESPACE)  # whoever uses this Ray next has another storage
    print("SEEN", json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:] == ["long"])
