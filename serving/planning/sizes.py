"""A profile in numbers: shapes of its models, what a node holds of its replicas, and rates where none were measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.planning import estimates
from cluster.planning.costs import MemoryKind, ModelShape, PlanError, slots_of
from cluster.planning.estimates import Assumptions, Engine, Processor
from cluster.planning.plan import Rates, Replica, Sizes
from cluster.pools.pools import PoolConfig
from memory_worker.models import embedded
from serving.config import EMBEDDED, Profile

DEFAULT_GPU = "h100"  # of a pool that names no accelerator type


@dataclass(frozen=True, slots=True)
class NodeType:
    """What each node of the cluster has."""

    gpus: int
    cpus: int
    gpu: str | None = None  # name of its GPUs; none takes the pool's accelerator type, or the default
    gpu_bytes: float | None = None  # of one; none takes its data sheet's

    def replica(self, pool: PoolConfig, ranks: int = 1) -> Replica:
        """One replica on `pool`, or one of its `ranks`."""
        gpus, cpus = pool.gpus_per_replica / ranks, pool.cpus_per_replica
        if 0 < gpus < 1:
            fitting = self.gpus * float(int(1 / gpus + 1e-9))  # a share is of one GPU
        else:
            fitting = self.gpus / gpus if gpus else self.cpus / cpus
        return Replica(gpus, cpus, max(1, int(fitting + 1e-9)))

    def gpu_name(self, pool: PoolConfig) -> str:
        return self.gpu or pool.accelerator_type or DEFAULT_GPU

    def memory_bytes(self, pool: PoolConfig) -> float:
        """Bytes of one GPU of `pool`."""
        return self.gpu_bytes or estimates.find_gpu(self.gpu_name(pool)).memory_gb * 1e9

    def processor(self, pool: PoolConfig, ranks: int = 1) -> Processor:
        """What one replica of `pool`, or one of its `ranks`, computes on: of a shared GPU as much as its share."""
        if pool.gpus_per_replica:
            return estimates.find_gpu(self.gpu_name(pool)).times(pool.gpus_per_replica / ranks)
        return estimates.cpu_core().times(pool.cpus_per_replica)

    def describe(self, pool: PoolConfig) -> str:
        """One replica's processor in words."""
        if pool.gpus_per_replica:
            return f"{pool.gpus_per_replica:g} {self.gpu_name(pool)}"
        return f"{pool.cpus_per_replica:g} CPU cores"


def read_shape(model: str, files: Mapping[str, Path]) -> ModelShape:
    """The shape of a model by its name. Raises `PlanError` that says how to give it."""
    return ModelShape.of(_read_config(model, files))


def kind_of(model: str, files: Mapping[str, Path]) -> MemoryKind:
    """The kind of memories that a model makes where nobody names one."""
    return "beacon" if _read_config(model, files).get("beacon_window") else "pruned"


def _read_config(model: str, files: Mapping[str, Path]) -> Mapping[str, Any]:
    """A model's config.json: the one in `files`, its folder's, that of a known model, or the hub's."""
    folder = embedded.FOLDER if model == EMBEDDED else Path(model)
    file = files.get(model) or folder / "config.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if known := estimates.known_models().get(model):
        return known
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise PlanError(
            f"the shape of {model} cannot be read here ({type(error).__name__}): give its config.json with "
            f"--shape {model}=FILE"
        ) from error


def sizes_of(profile: Profile, node: NodeType, files: Mapping[str, Path]) -> Sizes:
    """The profile in numbers. Raises `PlanError` where the memory model leaves no room for a KV cache."""
    memory, pools = profile.memory, profile.pools
    shape = read_shape(memory.engine.model, files)
    if pools.memory.gpus_per_replica:
        # vLLM's share is of each whole GPU, however small the part of it that Ray counts for a replica.
        kv = memory.engine.ranks * node.memory_bytes(pools.memory) * memory.engine.gpu_memory_utilization
        kv -= shape.weight_bytes
    else:
        kv = float(memory.engine.cpu_kv_cache_gib * 2**30)
    if kv <= 0:
        raise PlanError(
            f"the memory model's weights ({shape.weight_bytes / 1e9:.1f} GB) leave no room for a KV cache: raise "
            "memory.engine.gpu_memory_utilization, or plan with a larger --gpu or --gpu-gb"
        )
    return Sizes(
        memory=shape,
        memorizer=node.replica(pools.memory, memory.engine.ranks),
        ranks=memory.memorize.ranks,
        group_windows=memory.memorize.group_windows or 8,
        segment_slots=memory.group_slots,
        recaller=node.replica(pools.memory),
        kv_bytes=kv,
        keeper_bytes=float(memory.keeper.budget_bytes),
        retrieval=node.replica(pools.retrieval),
        generator=node.replica(pools.generator) if profile.generator.engine else None,
        router=node.replica(pools.cpu),
    )


def estimate_rates(
    profile: Profile,
    name: str,
    node: NodeType,
    files: Mapping[str, Path],
    assumed: Assumptions,
    *,
    kind: MemoryKind,
    tokens: int,
    ratio: int,
) -> Rates:
    """Rates of the profile called `name`, for memories of so many tokens, from data sheets: nothing is measured.

    Raises `PlanError` for a GPU or model that is not known, and for a generator that does not fit its GPUs.
    """
    memory, pools, retrieval = profile.memory, profile.pools, profile.retrieval
    engine = Engine(read_shape(memory.engine.model, files), node.processor(pools.memory))
    rank = Engine(engine.shape, node.processor(pools.memory, memory.engine.ranks))
    slots = slots_of(tokens, ratio) + assumed.head_slots
    groups = -(-slots // memory.group_slots)  # prompts that a long memory is asked in
    written = memory.recall.max_clue_tokens * assumed.clue_tokens_share
    context = slots / groups
    recalled = estimates.estimate_writing(
        engine, assumed, tokens=written, prompt=assumed.instruction_tokens, context=context
    )
    machines = [f"{pool} on {node.describe(getattr(pools, pool))}" for pool in ("memory", "retrieval", "generator")]
    embedder = read_shape("minilm" if retrieval.embedder.kind == "minilm" else retrieval.embedder.model, files)
    characters = retrieval.passages.max_characters * assumed.passage_share
    passage_tokens = characters / assumed.characters_per_token
    answer = min(assumed.answer_tokens, profile.generator.max_answer_tokens)
    return Rates(
        profile=name,
        machine=f"data sheets ({', '.join(machines)})",
        memorize_kind=kind,
        memorize_flops=estimates.estimate_memorize_flops(
            rank, assumed, kind, ratio, memory.memorize.group_windows or 8
        ),
        link_bytes_per_s=rank.processor.link_gb_per_s * 1e9,
        recall_questions_per_s=recalled / (written * assumed.clue_kinds * groups),
        embed_passages_per_s=estimates.estimate_embedding(
            embedder, node.processor(pools.retrieval), assumed, passage_tokens
        ),
        search_questions_per_s=pools.retrieval.cpus_per_replica / assumed.search_core_s,
        search_texts=1.0 + assumed.clues,
        generate_tokens_per_s=_generate_tokens_per_s(profile, node, files, assumed, answer),
        answer_tokens=answer,
        characters_per_token=assumed.characters_per_token,
        passage_characters=characters,
        passage_bytes=characters + 2 * embedder.hidden + 8 * passage_tokens,  # text, vector, words with weights
        head_slots=assumed.head_slots,
        **assumed.model_dump(include={"recall_core_s", "search_core_s", "generate_core_s", "route_core_s"}),
    )


def _generate_tokens_per_s(
    profile: Profile, node: NodeType, files: Mapping[str, Path], assumed: Assumptions, tokens: int
) -> float:
    engine, pool = profile.generator.engine, profile.pools.generator
    if engine is None:
        return 1e9  # another's endpoint: no pool of ours is planned for it
    shape = read_shape(engine.model, files)
    room = engine.ranks * node.memory_bytes(pool) * engine.gpu_memory_utilization
    if pool.gpus_per_replica and shape.weight_bytes >= room:
        raise PlanError(
            f"the generator's weights ({shape.weight_bytes / 1e9:.1f} GB) do not fit the {room / 1e9:.1f} GB that its "
            f"engine has of {engine.ranks} {node.gpu_name(pool)}: raise generator.engine.tensor_parallel_size and "
            "pools.generator.gpus_per_replica, or plan with a larger --gpu"
        )
    prompt = profile.retrieval.search.budget_tokens + assumed.instruction_tokens
    return estimates.estimate_writing(
        Engine(shape, node.processor(pool)), assumed, tokens=tokens, prompt=prompt, context=prompt + tokens / 2
    )
