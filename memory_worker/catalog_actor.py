"""The catalog as the one actor of its name in a Ray namespace: found, or started, by whoever needs it."""

from typing import Any

import ray

from memory_worker.catalog import Catalog
from memory_worker.config import CatalogConfig
from memory_worker.keeper import NAMESPACE
from memory_worker.quotas import QuotasConfig

CATALOG = "memory-catalog"
_CONCURRENT_CALLS = 10_000  # every open event stream is a call that waits


def catalog(
    storage_root: str,
    namespace: str = NAMESPACE,
    config: CatalogConfig | None = None,
    quotas: QuotasConfig | None = None,
) -> "ray.actor.ActorHandle":
    """The cluster's catalog, started if there is none; all who use one namespace share it."""
    actor: Any = ray.remote(Catalog)
    return actor.options(
        name=CATALOG,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=_CONCURRENT_CALLS,
    ).remote(storage_root, config, quotas)
