"""How large a cluster must be for so many memories and questions: arithmetic on shapes and rates.

`memorag plan` gives it a profile's sizes and rates, measured by `memorag calibrate` or estimated (`estimates`), and
shows what comes out. Each pool has
several **needs**, each in units of what it is made of (replicas, or nodes for their object store); the largest sets
the pool's size. Of all needs, the one that fills what was given to it most is what binds first when load grows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from cluster.config import Settings
from cluster.planning.costs import (
    MemoryKind,
    ModelShape,
    RankRates,
    estimate_memorizing,
    ranks_of,
    segment_tokens_of,
    slots_of,
)


class Rates(Settings):
    """What one replica of each deployment does: a file that `memorag calibrate` writes, or an estimate."""

    profile: str = Field(description="profile that was measured")
    machine: str = Field(description="what it ran on")
    memorize_kind: MemoryKind = Field("beacon", description="kind of memory that was made")
    memorize_flops: float = Field(gt=0, description="counted FLOP/s of one rank of a Memorizer")
    link_bytes_per_s: float | None = Field(
        None, gt=0, description="bytes/s that one rank receives from the others; none takes the exchange for nothing"
    )
    recall_questions_per_s: float = Field(gt=0, description="questions whose clues one Recaller recalls a second")
    embed_passages_per_s: float = Field(gt=0, description="passages one Embedder embeds a second")
    search_questions_per_s: float = Field(gt=0, description="questions one Retriever searches a second, with clues")
    search_texts: float = Field(gt=0, description="texts embedded for one question: itself and its clues")
    generate_tokens_per_s: float = Field(gt=0, description="tokens one Generator writes a second, over all requests")
    answer_tokens: float = Field(gt=0, description="tokens of an answer, where a plan names none")
    characters_per_token: float = Field(gt=0, description="characters of a text for each token of the memory model")
    passage_characters: float = Field(gt=0, description="characters of one passage")
    passage_bytes: float = Field(gt=0, description="bytes of one passage in storage, with its vectors")
    head_slots: int = Field(ge=0, description="slots of the instruction before every memory")
    recall_core_s: float = Field(ge=0, description="CPU seconds of a Recaller for one question")
    search_core_s: float = Field(ge=0, description="CPU seconds of Embedder and Retriever for one question")
    generate_core_s: float = Field(ge=0, description="CPU seconds of a Generator for one token")
    route_core_s: float = Field(gt=0, description="CPU seconds of Router and Ingress for one question")


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of the cluster."""

    memories: int
    tokens: int  # of each memory
    questions_per_s: float
    ratio: int  # 1 for `full`; a gist is planned as long as it may be
    kind: MemoryKind = "beacon"
    hours: float = 24.0  # in which all memories are made
    hot: float = 0.2  # share of the memories that questions are about at a time
    answer_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Replica:
    """What one replica takes of a node, and what a node has."""

    gpus: float
    cpus: float
    per_node: int  # replicas that fit a node


@dataclass(frozen=True, slots=True)
class Sizes:
    """A profile in numbers."""

    memory: ModelShape
    memorizer: Replica
    ranks: int  # of one Memorizer; `memorizer` is one rank
    group_windows: int
    segment_slots: int  # slots of the longest segment
    recaller: Replica
    kv_bytes: float  # of one Recaller's KV cache
    keeper_bytes: float  # of memories in one node's object store
    retrieval: Replica
    generator: Replica | None  # none where it is remote
    router: Replica


@dataclass(frozen=True, slots=True)
class ResourceNeed:
    """One resource of a pool: `wanted` of it, in `unit`s, of which `given` are planned."""

    pool: str
    resource: str
    wanted: float
    unit: str
    given: int

    @property
    def fill(self) -> float:
        """Share of what is given that is used."""
        return self.wanted / self.given


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool's size."""

    name: str
    gpus: float
    nodes: int
    needs: tuple[ResourceNeed, ...]

    @property
    def binds(self) -> ResourceNeed:
        """What is fullest."""
        return max(self.needs, key=lambda need: need.fill)


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """What the demand takes. Bytes are of all memories together."""

    demand: Demand
    slots: int  # of one memory
    memory_bytes: float  # slots of one memory
    store_bytes: float  # object store: slots of the hot memories
    storage_bytes: float
    memorize_s: float  # one memory on one Memorizer
    pools: tuple[PoolPlan, ...]

    @property
    def binds(self) -> ResourceNeed:
        """What is fullest of all: more load needs more of it first."""
        return max((pool.binds for pool in self.pools), key=lambda need: need.fill)

    @property
    def gpus(self) -> float:
        return sum(pool.gpus for pool in self.pools)

    @property
    def nodes(self) -> int:
        return sum(pool.nodes for pool in self.pools)


def plan(demand: Demand, sizes: Sizes, rates: Rates) -> CapacityPlan:
    """The smallest cluster of whole replicas and nodes for `demand`, each pool on nodes of its own."""
    slots = slots_of(demand.tokens, demand.ratio) + rates.head_slots
    memory_bytes = float(slots * sizes.memory.slot_bytes)
    hot = max(1.0, demand.memories * demand.hot)
    characters = demand.tokens * rates.characters_per_token
    passages = characters / rates.passage_characters
    seconds = demand.hours * 3600
    memorize_s = memorize_seconds(demand.tokens, demand.ratio, sizes, rates, demand.kind)
    questions = demand.questions_per_s
    tokens = demand.answer_tokens or rates.answer_tokens

    makers = _provision("memory", "memorizing", demand.memories * memorize_s / seconds, "Memorizer")
    recalling, cached = questions / rates.recall_questions_per_s, hot * memory_bytes / sizes.kv_bytes
    recallers = max(_round_up(recalling), _round_up(cached))
    ranks = makers.given * sizes.ranks
    nodes = math.ceil(ranks / sizes.memorizer.per_node) + math.ceil(recallers / sizes.recaller.per_node)
    stored = hot * memory_bytes / sizes.keeper_bytes
    nodes = max(nodes, _round_up(stored))
    needs = (
        makers,
        ResourceNeed("memory", "recalling", recalling, "Recaller", recallers),
        ResourceNeed("memory", "KV cache", cached, "Recaller", recallers),
        ResourceNeed("memory", "object store", stored, "node", nodes),
    )
    pools = [PoolPlan("memory", ranks * sizes.memorizer.gpus + recallers * sizes.recaller.gpus, nodes, needs)]
    texts = demand.memories * passages / seconds + questions * rates.search_texts
    embedders = _provision("retrieval", "embedding", texts / rates.embed_passages_per_s, "Embedder")
    retrievers = _provision("retrieval", "searching", questions / rates.search_questions_per_s, "Retriever")
    pools.append(_pool("retrieval", sizes.retrieval, (embedders, retrievers), embedders.given))
    if sizes.generator:
        writers = _provision("generator", "generating", questions * tokens / rates.generate_tokens_per_s, "Generator")
        pools.append(_pool("generator", sizes.generator, (writers,), writers.given))
    routers = _provision("cpu", "routing", questions * rates.route_core_s / sizes.router.cpus, "Router")
    pools.append(_pool("cpu", sizes.router, (routers,), routers.given))
    storage = demand.memories * (memory_bytes + characters + passages * rates.passage_bytes)
    return CapacityPlan(demand, slots, memory_bytes, hot * memory_bytes, storage, memorize_s, tuple(pools))


def memorize_seconds(tokens: int, ratio: int, sizes: Sizes, rates: Rates, kind: MemoryKind = "beacon") -> float:
    """One text on one Memorizer, by counted FLOPs and what its ranks exchange."""
    return estimate_memorizing(
        sizes.memory,
        tokens,
        ratio=ratio,
        segment_tokens=segment_tokens_of(sizes.memory, kind, ratio, sizes.segment_slots - rates.head_slots),
        ranks=ranks_of(kind, sizes.ranks),
        group_windows=sizes.group_windows,
        rates=RankRates(rates.memorize_flops, rates.link_bytes_per_s or math.inf, 0.0),
        head_slots=rates.head_slots,
        kind=kind,
    ).seconds


def shared_questions_per_s(rates: Rates, cores: int, answer_tokens: float | None = None) -> float:
    """Questions per second where all pools share a machine of so many cores, and were measured on it one at a time.

    No stage is faster than alone, and all of them together have the machine's cores.
    """
    tokens = answer_tokens or rates.answer_tokens
    core_s = rates.recall_core_s + rates.search_core_s + tokens * rates.generate_core_s + rates.route_core_s
    alone = (rates.recall_questions_per_s, rates.search_questions_per_s, rates.generate_tokens_per_s / tokens)
    return min(*alone, cores / core_s)


def curve(demand: Demand, sizes: Sizes, rates: Rates, loads: Sequence[float]) -> list[tuple[float, CapacityPlan]]:
    """The plan at each of `loads` questions per second."""
    return [(load, plan(replace(demand, questions_per_s=load), sizes, rates)) for load in loads]


def _pool(name: str, replica: Replica, needs: tuple[ResourceNeed, ...], replicas: int) -> PoolPlan:
    return PoolPlan(name, replicas * replica.gpus, math.ceil(replicas / replica.per_node), needs)


def _provision(pool: str, resource: str, wanted: float, unit: str) -> ResourceNeed:
    return ResourceNeed(pool, resource, wanted, unit, _round_up(wanted))


def _round_up(wanted: float) -> int:
    """At least one, and room for what a sum of floats is over by."""
    return max(1, math.ceil(wanted - 1e-9))
