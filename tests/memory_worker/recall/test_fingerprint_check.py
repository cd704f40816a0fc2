"""The connector is told the model's fingerprint, so that it refuses memories of another: also for a name on a hub."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import ray

from cluster.config import EngineConfig
from cluster.engine_server import EngineServer
from memory_worker.config import MemoryConfig
from memory_worker.models.beacon.checkpoint import fingerprint
from memory_worker.recall import recaller
from memory_worker.recall.application import recall_engine_kwargs

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Told(Exception):
    """Ends the start of the engine that is not wanted here."""


@pytest.mark.parametrize("named", ["folder", "hub"])
async def test_the_connector_checks_the_fingerprint(
    named: str, random_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = random_model
    cached = tmp_path / "hub" / "models--tests--memory-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(REVISION)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / REVISION).symlink_to(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(recaller, "local_keeper", lambda *_: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="nowhere:1"))

    async def begin(self: EngineServer, config: Any, **_: Any) -> None:
        raise Told(config["engine_kwargs"]["kv_transfer_config"]["kv_connector_extra_config"]["fingerprint"])

    monkeypatch.setattr(EngineServer, "__init__", begin)
    model = str(folder) if named == "folder" else "tests/memory-model"
    config = MemoryConfig(engine=EngineConfig(model=model))
    llm_config = {"engine_kwargs": recall_engine_kwargs()}
    with pytest.raises(Told, match=fingerprint(folder)):
        await recaller.Recaller.__init__(
            object.__new__(recaller.Recaller),
            llm_config,
            config=config,
            storage_root=str(tmp_path),
            namespace="tests",
            secret=b"secret",
        )
