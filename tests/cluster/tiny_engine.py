"""A small engine, and the Ray session that tests of engines run in."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve

from cluster.config import EngineConfig


def tiny_engine(model: Path, **changes: object) -> EngineConfig:
    """An engine that starts as fast as one can; `changes` to its settings."""
    settings = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "block_size": 32,
        "enforce_eager": True,
    }
    return EngineConfig.model_validate(settings | changes)


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray of its own, with Serve, gone without a trace at the end."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    try:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=300 * 2**20,
            _temp_dir=folder,
            log_to_driver=False,
        )
        yield
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
