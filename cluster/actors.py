"""Actors that outlive whoever starts them, found by name: the catalog, keepers, batch runs."""

from typing import Any

import ray


def lasting_actor(cls: type, name: str, namespace: str, **options: Any) -> Any:
    """What makes the one actor of that name, or finds it: call `remote` on it with the arguments of `cls`.

    It takes no CPU. One that dies comes back, made of the same arguments, and calls under way are repeated.
    """
    return ray.remote(cls).options(
        name=name,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        **options,
    )


def actor_names(namespace: str, prefix: str = "") -> list[str]:
    """Of the living named actors of a namespace, those that begin so."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in named if each["namespace"] == namespace and each["name"].startswith(prefix)]
