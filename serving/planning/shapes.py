"""Shapes of models as their config.json has them, for plans and calibrations."""

import json
from collections.abc import Mapping
from pathlib import Path

from cluster.planning.costs import ModelShape
from memory_worker.models import embedded
from serving.config import EMBEDDED


def read_shape(model: str, files: Mapping[str, Path]) -> ModelShape:
    """Of a model's config.json: a file given for it, its folder, or the hub's. Raises `ValueError`."""
    if model in files:
        return ModelShape.of(json.loads(files[model].read_text(encoding="utf-8")))
    folder = embedded.FOLDER if model == EMBEDDED else Path(model)
    if folder.is_dir():
        return ModelShape.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    from transformers import AutoConfig

    try:
        return ModelShape.of(AutoConfig.from_pretrained(model).to_dict())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the shape of {model} cannot be read here ({type(error).__name__}): give its config.json with "
            f"--shape {model}=FILE"
        ) from error
