"""Recalls over memories of every kind with a real engine.

`engine_scenarios` runs them, and `test_kinds.py` says what is right.
"""

import asyncio
from typing import Any

import ray
import torch
from transformers import DynamicCache

from benchmarks.support.recall_engine import NAMESPACE, Reference, recalled, request
from memory_worker.keeper.keeper import local_keeper
from memory_worker.manifest import Manifest
from memory_worker.memorize.memorizer import Memorizer
from memory_worker.messages import SegmentGroup
from memory_worker.models.beacon import Slots
from memory_worker.models.fingerprint import fingerprint_of
from memory_worker.recall.groups import segment_groups
from memory_worker.storage.segments import as_torch
from memory_worker.storage.store import MemoryStore
from tests.support.kinds_of_memory import NOTE, RATIOS, STORY, TWIN, memorized

NEW_TOKENS = 24
GROUP_SLOTS = 2600
QUESTION = [*range(700, 720)]


def kinds(llm: Any, store: MemoryStore, memorizer: Memorizer, reference: Reference) -> dict[str, Any]:
    """What an engine of the memorizer's model, which checks the fingerprint, does with memories of every kind."""
    made: dict[str, dict[str, Manifest]] = {}
    for kind in RATIOS:
        texts = {"note": {"note": NOTE}, "twin": {"twin": TWIN}, "story": {"story": STORY}}
        made[kind] = {
            name: asyncio.run(memorized(memorizer, store, f"{kind}-{name}", kind, text)) for name, text in texts.items()
        }
    seen = {kind: asked(llm, store, reference, memories) for kind, memories in made.items()}
    for kind in RATIOS:  # of the engine's own shape and dtype: only the fingerprint tells
        other = {"memory": f"{kind}-foreign", "fingerprint": fingerprint_of(kind, "0" * 64)}
        store.publish(foreign := made[kind]["note"].model_copy(update=other))
        seen[kind]["other_model"] = recalled(llm, [request(groups_of(foreign)[0], QUESTION, 4)])
    seen["full"]["plain"] = plain(llm, memorizer, reference, made["full"]["note"])
    seen["together"] = together(llm, store, reference, made)
    return seen


def groups_of(manifest: Manifest) -> tuple[SegmentGroup, ...]:
    return segment_groups([manifest], GROUP_SLOTS)


def stored(store: MemoryStore, group: SegmentGroup, manifests: dict[Any, Manifest]) -> Slots:
    """The group's slots as they lie in files: head, then segments."""
    files = [manifests[group.ranges[0].key].head]
    for part in group.ranges:
        files += [file for segment in manifests[part.key].segments[part.first : part.end] for file in segment.files]
    return Slots.concat([Slots(*store.read_segment(file).tensors()) for file in files])


def asked(llm: Any, store: MemoryStore, reference: Reference, memories: dict[str, Manifest]) -> dict[str, Any]:
    """Every group of all memories of a kind, asked the same question at once."""
    keeper = local_keeper(store.storage.root, 2**30, NAMESPACE)
    requests, right, loaded = [], [], []
    counts = {name: len(groups_of(manifest)) for name, manifest in memories.items()}
    for manifest in memories.values():
        for group in groups_of(manifest):
            slots = stored(store, group, {part.key: manifest for part in group.ranges})
            kept = ray.get(keeper.chunks.remote(group))
            chunks = [as_torch(ray.get(chunk), kept.shape.dtype).transpose(2, 3) for chunk in kept.chunks]
            both = torch.cat(chunks, dim=3)
            loaded.append(torch.equal(both[0], slots.keys) and torch.equal(both[1], slots.values))
            requests.append(request(group, QUESTION, NEW_TOKENS))
            right.append(reference.continued(reference.cache([(slots.keys, slots.values)]), QUESTION, NEW_TOKENS))
    answers = recalled(llm, requests)
    again = recalled(llm, requests[::-1])[::-1]
    return {
        "groups": counts,
        "loaded": all(loaded),
        "right": sum(answer == tokens for answer, tokens in zip(answers, right, strict=True)),
        "again": answers == again,
        "different": len({tuple(tokens) for tokens in right}),
    }


def plain(llm: Any, memorizer: Memorizer, reference: Reference, manifest: Manifest) -> bool:
    """Whether a full memory is answered as the text itself, read anew."""
    text = [*manifest.head_tokens, *memorizer._encode(NOTE), *QUESTION]
    (answer,) = recalled(llm, [request(groups_of(manifest)[0], QUESTION, NEW_TOKENS)])
    return bool(answer == reference.continued(DynamicCache(), text, NEW_TOKENS))


def together(
    llm: Any, store: MemoryStore, reference: Reference, made: dict[str, dict[str, Manifest]]
) -> dict[str, Any]:
    """Memories of different kinds asked at once: each kind in groups of its own."""
    manifests = [memories["note"] for memories in made.values()]
    groups = segment_groups(manifests, GROUP_SLOTS)
    answers = recalled(llm, [request(group, QUESTION, NEW_TOKENS) for group in groups])
    right = []
    for group, manifest in zip(groups, manifests, strict=True):
        slots = stored(store, group, {part.key: manifest for part in group.ranges})
        right.append(reference.continued(reference.cache([(slots.keys, slots.values)]), QUESTION, NEW_TOKENS))
    return {"groups": len(groups), "right": answers == right}
