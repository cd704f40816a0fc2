"""Which model and recipe made a memory: a memory of another is refused, since its slots mean nothing to this one."""

import hashlib
import json
from functools import lru_cache

from cluster.planning.costs import GIST_WINDOW, MemoryKind
from memory_worker.models.prompts import gist_prompts_digest, repeat_prompts_digest

KINDS: tuple[MemoryKind, ...] = ("beacon", "full", "gist", "pruned")
_FULL_RECIPE = 1  # each counts changes of how the same model makes a memory of that kind
_GIST_RECIPE = 1
_PRUNED_RECIPE = 1


@lru_cache
def fingerprint_of(kind: MemoryKind, model: str) -> str:
    """Of all that decides a memory of this kind: `model`, the fingerprint of its weights, and the kind's own recipe.

    SHA-256, hexadecimal; that of `beacon` is the model's own, in which the beacon weights are.
    """
    if kind == "beacon":
        return model
    recipes: dict[MemoryKind, list[int | str]] = {
        "full": [_FULL_RECIPE],
        "gist": [_GIST_RECIPE, GIST_WINDOW, gist_prompts_digest()],
        "pruned": [_PRUNED_RECIPE, repeat_prompts_digest()],
    }
    return hashlib.sha256(json.dumps([model, kind, *recipes[kind]]).encode()).hexdigest()
