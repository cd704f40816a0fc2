"""What a running server looks like from inside its Ray cluster: pools, replicas, memories, rates.

Asked by `memorag status --live`, from a process that has joined the cluster (`serving.deploy.attach`).
"""

import time
from dataclasses import dataclass, replace

from cluster.actors import actor_names
from memory_worker.catalog.actor import CATALOG
from memory_worker.keeper.keeper import KeeperStats
from memory_worker.keeper.peers import KEEPER
from memory_worker.messages import CatalogTotals
from serving.config import APPLICATION, Profile
from serving.deploy.app import needs_of
from serving.deploy.attach import NotAttached

_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Replicas:
    """One deployment."""

    pool: str
    deployment: str
    running: int
    wanted: int  # of the autoscaler, or fixed
    most: int  # that the pool may have
    status: str  # Serve's, such as HEALTHY or UPSCALING


@dataclass(frozen=True, slots=True)
class Overview:
    """One look at a server. Rates are since the look before; there are none in the first."""

    at: float  # monotonic seconds
    replicas: tuple[Replicas, ...]
    keepers: dict[str, KeeperStats]  # by node
    totals: CatalogTotals
    reads_per_s: float | None = None  # versions read for questions
    memorized_tokens_per_s: float | None = None

    def since(self, before: "Overview") -> "Overview":
        """This look, with the rates since that one."""
        if (seconds := self.at - before.at) <= 0:
            return self
        reads = max(0, self.totals.reads - before.totals.reads)  # a catalog that died counts anew
        tokens = max(0, self.totals.done_tokens + self.totals.tokens - before.totals.done_tokens - before.totals.tokens)
        return replace(self, reads_per_s=reads / seconds, memorized_tokens_per_s=tokens / seconds)


def look(profile: Profile) -> Overview:
    """Raises `NotAttached` where the server that has this profile does not run on the cluster."""
    import ray
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)  # `serve.status` leaves out what is wanted
    applications = client.get_serve_details()["applications"] if client else {}
    if APPLICATION not in applications:
        raise NotAttached(f"the cluster runs no application {APPLICATION!r}; start one with 'memorag up'")
    deployments = applications[APPLICATION]["deployments"]
    replicas = []
    for need in needs_of(profile):
        if found := deployments.get(need.deployment):
            running = sum(replica["state"] == "RUNNING" for replica in found["replicas"])
            most = getattr(profile.pools, need.pool).max_replicas
            wanted = found["target_num_replicas"]
            replicas.append(Replicas(need.pool, need.deployment, running, wanted, most, found["status"]))
    namespace = profile.ray.namespace
    keepers = actor_names(namespace, KEEPER)
    asked = [ray.get_actor(name, namespace).stats.remote() for name in keepers]
    totals, *stats = ray.get([ray.get_actor(CATALOG, namespace).totals.remote(), *asked], timeout=_ANSWER_S)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    # Nodes of one machine share its address: there their ids tell them apart.
    ids = [name.rpartition("-")[2] for name in keepers]
    labels = [nodes.get(id, "?") if len(set(nodes.values())) == len(nodes) else id[:8] for id in ids]
    return Overview(time.monotonic(), tuple(replicas), dict(zip(labels, stats, strict=True)), totals)
