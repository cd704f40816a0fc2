"""Recalling without a server: stored memories, an engine in this process, and transformers to compare with.

An engine in one process needs variables that hold for the whole process (`IN_PROCESS`).
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.support.own_ray import own_ray
from memory_worker.head_pools import Counts
from memory_worker.manifest import DocumentEntry, Manifest, MemoryKey, MemoryShape, SegmentEntry, now
from memory_worker.messages import SegmentGroup, SegmentRange
from memory_worker.recall.application import recall_engine_kwargs
from memory_worker.storage.store import MemoryStore, head_path, segment_path

NAMESPACE = "recalling"
PLACEHOLDER = 0

# Of a process that runs an engine itself: it starts in seconds, and with one thread does not stumble over itself.
IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # else ranks of an engine compile, each for a minute, what runs once
}

Slots = tuple[torch.Tensor, torch.Tensor]  # unrotated keys, values [layers, kv_heads, slots, head_dim]


def store_slots(
    store: MemoryStore,
    key: MemoryKey,
    parts: Sequence[Slots],
    fingerprint: str = "f" * 64,
    counts: Sequence[Counts | None] | None = None,
) -> Manifest:
    """A published version whose head is the first of `parts` and whose documents are the others, with the `counts` of
    each one's pool, where there are any."""
    keys = parts[0][0]
    dtype: Any = str(keys.dtype).removeprefix("torch.")
    shape = MemoryShape(layers=keys.shape[0], kv_heads=keys.shape[1], head_dim=keys.shape[3], dtype=dtype)
    paths = [head_path(key), *(segment_path(key, f"doc{index}", 0, 0) for index in range(1, len(parts)))]
    pools = [None] * len(parts) if counts is None else counts
    entries = [
        store.write_segment(path, shape, [part], pool) for path, part, pool in zip(paths, parts, pools, strict=True)
    ]
    nothing = store.storage.write(f"{key.path}/nothing", b"")
    manifest = Manifest(
        tenant=key.tenant,
        memory=key.memory,
        version=key.version,
        created=now(),
        model="test",
        fingerprint=fingerprint,
        ratio=4,
        language="en",
        shape=shape,
        head_tokens=tuple(range(keys.shape[2])),
        head=entries[0],
        documents=tuple(
            DocumentEntry(
                id=f"doc{i}",
                characters=1,
                source=nothing,
                segments=(SegmentEntry(tokens=1, slots=part[0].shape[2], files=(entry,)),),
                passages=nothing,
                passage_count=0,
            )
            for i, (part, entry) in enumerate(zip(parts[1:], entries[1:], strict=True), 1)
        ),
    )
    store.publish(manifest)
    return manifest


def group(key: MemoryKey, documents: int, slots: int) -> SegmentGroup:
    """All of a version that `store_slots` stored."""
    return SegmentGroup((SegmentRange(key, 0, documents),), slots)


def connector_config(store: MemoryStore, **changes: Any) -> dict[str, Any]:
    """The connector's extra config, for the Ray that this process is connected to."""
    return {
        "ray_address": ray.get_runtime_context().gcs_address,
        "namespace": NAMESPACE,
        "storage_root": store.storage.root,
        "keeper_budget_bytes": 2**30,
        "keeper_timeout_s": 600.0,  # it starts with the first load
        **changes,
    }


# What is measured here against this process runs with the same niceness.
ray_of_its_own = partial(own_ray, namespace=NAMESPACE, _system_config={"worker_niceness": 0})


@contextmanager
def engine(model: Path, connector: dict[str, Any], **options: Any) -> Iterator[Any]:
    """A vLLM `LLM` that reads memories."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "block_size": 32, **options}
    llm = LLM(str(model), **settings, **recall_engine_kwargs(connector))
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()


def request(group: SegmentGroup, question: list[int], max_tokens: int, salt: bool = True) -> tuple[Any, Any]:
    """Prompt and sampling parameters as the Recaller submits them, but without stopping."""
    from vllm import SamplingParams

    prompt: dict[str, Any] = {"prompt_token_ids": [PLACEHOLDER] * group.slots + question}
    if salt:
        prompt["cache_salt"] = group.name
    asked = {"memory": group.name, "num_memory_tokens": group.slots}
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_transfer_params": asked},
    )
    return prompt, params


def recalled(llm: Any, requests: Sequence[tuple[Any, Any]]) -> list[list[int] | str]:
    """For each request the tokens generated, or the finish reason where there are none."""
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    return [list(o.outputs[0].token_ids) or str(o.outputs[0].finish_reason) for o in outputs]


class Reference:
    """Stock transformers over a memory given as its `past_key_values`, one question at a time."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from memory_worker.models.beacon import Rope

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._rope = Rope.from_config(self.model.config.to_dict())

    def cache(self, parts: Sequence[Slots]) -> Any:
        """The memory as transformers keeps keys and values."""
        from transformers import DynamicCache

        keys, values = (torch.cat([part[i].float() for part in parts], dim=2) for i in (0, 1))
        keys = self._rope.rotate_layers(keys, torch.arange(keys.shape[2]))
        cache = DynamicCache()
        for layer in range(keys.shape[0]):
            cache.update(keys[layer][None], values[layer][None], layer)
        return cache

    @torch.no_grad()
    def continued(self, cache: Any, question: list[int], max_tokens: int, end: int | None = None) -> list[int]:
        """The greedy tokens after `question`, until `end` where one is given; `cache` grows by them."""
        tokens = torch.tensor([question])
        new: list[int] = []
        while len(new) < max_tokens:
            logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            new.append(int(logits[0, -1].argmax()))
            if new[-1] == end:
                break
            tokens = torch.tensor([[new[-1]]])
        return new
