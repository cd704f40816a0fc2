"""The catalog as the one actor of its name in a Ray namespace: found, or started, by whoever needs it."""

import contextlib

import ray

from cluster.actors import actor_names, lasting_actor
from memory_worker.catalog.catalog import Catalog
from memory_worker.catalog.quotas import QuotasConfig
from memory_worker.config import CatalogConfig
from memory_worker.keeper.keeper import NAMESPACE
from memory_worker.keeper.peers import KEEPER

CATALOG = "memory-catalog"
_CONCURRENT_CALLS = 10_000  # every open event stream is a call that waits


def catalog(
    storage_root: str,
    namespace: str = NAMESPACE,
    config: CatalogConfig | None = None,
    quotas: QuotasConfig | None = None,
) -> "ray.actor.ActorHandle":
    """The cluster's catalog, started if there is none; all who use one namespace share it."""
    actor = lasting_actor(Catalog, CATALOG, namespace, max_concurrency=_CONCURRENT_CALLS)
    return actor.remote(storage_root, config, quotas)


def end_actors(namespace: str) -> None:
    """Ends the catalog and the keepers of a server that is gone: they would greet the next with another's storage."""
    for name in actor_names(namespace):
        if name == CATALOG or name.startswith(KEEPER):
            with contextlib.suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(name, namespace))
