"""A small engine, and the Ray session that tests of engines run in."""

from pathlib import Path

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
