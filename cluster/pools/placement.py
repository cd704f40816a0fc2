"""Whether a cluster has the nodes that a deployment's pools ask for, said before Serve waits for them in silence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import MessageError
from cluster.pools.pools import PoolConfig

_ACCELERATOR = "accelerator_type:"  # the resource that Ray gives a node for its GPUs' type


class PoolUnplaceable(MessageError):
    """A pool has no node to run on; the message says which, what is missing, and what the cluster has."""


@dataclass(frozen=True, slots=True)
class Node:
    """A living node: all its resources, used or not, and its labels."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> "Node":
        """From an item of `ray.nodes()`."""
        return cls(node["NodeManagerAddress"], node["Resources"], node.get("Labels") or {})

    def __str__(self) -> str:
        kept = {
            name: amount
            for name, amount in self.resources.items()
            if not name.startswith("node:") and name not in ("memory", "object_store_memory")
        }
        parts = [f"{amount:g} {name}" for name, amount in sorted(kept.items())]
        labels = [f"{name}={value}" for name, value in sorted(self.labels.items()) if name != "ray.io/node-id"]
        return f"{self.name} ({', '.join([*parts, *labels]) or 'nothing'})"


@dataclass(frozen=True, slots=True)
class ReplicaNeed:
    """The replicas of one deployment that must run: how many parts of them, and what each takes on one node."""

    deployment: str
    pool: str
    parts: int
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @classmethod
    def of(cls, deployment: str, name: str, pool: PoolConfig, ranks: int = 1) -> "ReplicaNeed":
        """`ranks`: processes of an engine that share what the pool gives a replica, and may be on several nodes."""
        ranks = ranks if pool.gpus_per_replica else 1
        whole = {"GPU": pool.gpus_per_replica, **pool.resources}
        resources = {"CPU": pool.cpus_per_replica} | {name: amount / ranks for name, amount in whole.items() if amount}
        if pool.accelerator_type:
            resources[_ACCELERATOR + pool.accelerator_type] = 0.001
        return cls(deployment, name, pool.min_replicas * ranks, resources, pool.node_labels)

    def fits(self, node: Node) -> bool:
        return all(node.resources.get(name, 0) >= amount for name, amount in self.resources.items()) and all(
            node.labels.get(name) == value for name, value in self.labels.items()
        )

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in self.resources.items()]
        labels = [f"the label {name}={value}" for name, value in self.labels.items()]
        return ", ".join([*parts, *labels])


def require_placeable(needs: Sequence[ReplicaNeed], nodes: Sequence[Node]) -> None:
    """Raises `PoolUnplaceable` if the fewest replicas of all pools cannot run on these nodes together.

    Each part has to fit one node; all together have to fit what the nodes have.
    """
    has = "The cluster has " + ("; ".join(map(str, nodes)) or "no nodes") + "."
    for need in needs:
        if need.parts and not any(need.fits(node) for node in nodes):
            raise PoolUnplaceable(
                f"The pool {need.pool!r} cannot be placed: a replica of {need.deployment} needs a node with {need}, "
                f"and no node has that. {has} Add such a node, or change pools.{need.pool} in the profile."
            )
    total: dict[str, float] = {}
    for need in needs:
        for name, amount in need.resources.items():
            total[name] = total.get(name, 0) + amount * need.parts
    for name, amount in total.items():
        there = sum(node.resources.get(name, 0) for node in nodes)
        if not name.startswith(_ACCELERATOR) and amount > there + 1e-6:
            users = ", ".join(f"{n.pool} ({n.deployment} × {n.parts})" for n in needs if name in n.resources)
            raise PoolUnplaceable(
                f"The pools cannot be placed together: they need {amount:g} {name} for {users}, and all nodes have "
                f"{there:g}. {has} Add nodes, or lower min_replicas or what a replica takes."
            )
