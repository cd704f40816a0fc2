"""Tiny training runs, for the tests of training."""

import json
from pathlib import Path
from typing import Any

from examples.chronicles import training_documents
from memory_worker.training import RunConfig


def write_documents(folder: Path, count: int = 12) -> Path:
    """Short chronicles with their questions, as JSON Lines."""
    folder.mkdir(exist_ok=True)
    file = folder / "chronicles.jsonl"
    made = training_documents(7, count, (10, 14), kinds=["direct"], verbs=1, openings=False, quiet=0, years=False)
    file.write_text("".join(json.dumps(document) + "\n" for document in made), "utf-8")
    return file


def tiny_run(folder: Path, **changes: Any) -> RunConfig:
    """A run of a model of 2 layers on `write_documents`, in two stages; the second one grows the model."""
    documents = str(write_documents(folder))
    stage = {
        "data": [{"kind": "documents", "files": [documents], "tasks": {"span": 1, "draft": 1, "recite": 1}}],
        "texts": 4,
        "tokens": 48,
        "questions": 3,
        "window": 16,
        "learning_rate": 0.01,
        "warmup_steps": 2,
    }
    settings: dict[str, Any] = {
        "output": str(folder / "run"),
        "threads": 1,
        "log_every": 2,
        "fresh": {
            "tokenizer": {"vocabulary": 400, "files": [documents]},
            "layers": 2,
            "hidden": 32,
            "heads": 2,
            "kv_heads": 2,
            "head_dim": 16,
            "mlp": 48,
            "window": 32,
        },
        "stages": [
            {**stage, "name": "short", "steps": 8, "ratios": [0, 4]},
            {**stage, "name": "wider", "steps": 8, "ratios": [2, 4], "text_loss": 0.1, "grow": {"hidden": 40}},
        ],
    }
    return RunConfig.model_validate({**settings, **changes})
