"""Which model and recipe made a memory: a memory of another is refused, since its slots mean nothing to this one."""

import hashlib
import json
from functools import lru_cache

from cluster.planning.costs import GIST_WINDOW, MemoryKind
from memory_worker.models.prompts import gist_prompts_digest

KINDS: tuple[MemoryKind, ...] = ("beacon", "full", "gist")
_FULL_RECIPE = 1  # each counts changes of how the same model makes a memory of that kind
_GIST_RECIPE = 1


@lru_cache
def fingerprint_of(kind: MemoryKind, model: str) -> str:
    """Of all that decides a memory of this kind: `model`, the fingerprint of its weights, and the kind's own recipe.

    SHA-256, hexadecimal; that of `beacon` is the model's own, in which the beacon weights are.
    """
    if kind == "beacon":
        return model
    recipe = [_FULL_RECIPE] if kind == "full" else [_GIST_RECIPE, GIST_WINDOW, gist_prompts_digest()]
    return hashlib.sha256(json.dumps([model, kind, *recipe]).encode()).hexdigest()
