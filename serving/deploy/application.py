"""The application as a Serve config file builds it: `import_path: serving.deploy.application:application`.

For clusters that are managed by `serve deploy`, `serve run` or KubeRay. The application is the one of `memorag up`:
both come from `deploy.app.build`. Ray itself is started by whoever runs the cluster, so of the profile's settings
under `ray` only `namespace` and `autoscaling` count here.
"""

from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from cluster.config import Settings
from cluster.pools.placement import PoolUnplaceable
from memory_worker.catalog.actor import end_actors
from serving.config import EMBEDDED, Profile, ProfileError, load_profile, parse_profile
from serving.deploy.app import build, memories_root, require_nodes, require_safe, resolve_models


class Arguments(Settings):
    """`args` of the application in a Serve config file."""

    profile: str | dict[str, Any] = Field(
        EMBEDDED, description="name of a profile, path of a YAML file that every node has, or the settings themselves"
    )
    storage: str = Field(
        "~/.memorag",
        description="folder that every node has at this path, or a `pyarrow.fs` URI such as s3://bucket/path",
    )


def application(arguments: Arguments) -> Application:
    """The application of that profile on that storage.

    Raises `RayServeException`, which Serve shows as the application's status, for a profile that cannot be used, one
    without keys where Serve listens on more than loopback, and a pool for which the cluster has no nodes.
    """
    try:
        profile = _profile(arguments.profile)
        if ray.is_initialized() and (client := _get_global_client(raise_if_no_controller_running=False)):
            require_safe(profile, str(client.http_config.host))
            require_nodes(profile)
            if not any(running.deployments for running in serve.status().applications.values()):
                end_actors(profile.ray.namespace)
        storage = arguments.storage if "://" in arguments.storage else str(Path(arguments.storage).expanduser())
        return build(resolve_models(profile), memories_root(storage))
    except (PoolUnplaceable, ProfileError) as error:
        raise RayServeException(str(error)) from None


def _profile(given: str | dict[str, Any]) -> Profile:
    return load_profile(given) if isinstance(given, str) else parse_profile(yaml.safe_dump(given), "args.profile")
