"""A Ray that nothing else on this machine finds, for the tests of one module."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve

_ATTEMPTS = 3


@contextmanager
def own_ray(**options: Any) -> Iterator[None]:
    """Starts it, with `options` of `ray.init`, and ends it with all Serve applications; nothing is left of it.

    A node has fixed 30 s to start, which a busy machine exceeds now and then: it is tried again.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short enough for the Unix sockets below it
    settings: dict[str, Any] = {
        "num_cpus": 8,
        "include_dashboard": False,
        "object_store_memory": 300 * 2**20,
        "logging_level": "ERROR",
        "log_to_driver": False,
    }
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                ray.init("local", _temp_dir=folder, **settings | options)
                break
            except Exception as error:  # Ray raises no more precise class here
                ray.shutdown()
                if "timed out during startup" not in str(error) or attempt == _ATTEMPTS:
                    raise
        yield
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
