"""A Ray that nothing else on this machine finds, for tests and benchmarks."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import ray
from ray import serve

from serving.deploy.local_ray import init_patiently


@contextmanager
def own_ray(**options: Any) -> Iterator[None]:
    """Starts it, with `options` of `ray.init`, and ends it with all Serve applications; nothing is left of it."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short enough for the Unix sockets below it
    settings: dict[str, Any] = {
        "num_cpus": 8,
        "include_dashboard": False,
        "object_store_memory": 300 * 2**20,
        "logging_level": "ERROR",
        "log_to_driver": False,
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", folder)  # for its workers: vLLM leaves its sockets behind
            init_patiently(_temp_dir=folder, **settings | options)
        yield
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def empty_ray() -> None:
    """Ends all applications and named actors of this process's Ray but Serve itself, for whoever uses it next."""
    for name in list(serve.status().applications):
        serve.delete(name)
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if not actor["name"].startswith("SERVE_"):
            with suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(actor["name"], actor["namespace"]))
