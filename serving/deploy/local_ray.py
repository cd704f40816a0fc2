"""A Ray cluster of this machine's own, on loopback, with its own folder and token: for laptops and tests."""

import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from serving.config import RayConfig
from serving.deploy.traces import find_processes, remove_traces, shared_memory_of, watch_over

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_WORKER_START_S = 3600  # Ray gives a worker 60 s to import Ray, which a busy machine exceeds; dead ones it sees at once
_TOKEN, _ADDRESS = "token", "address"  # files in Ray's folder
# Serve's handles go on asking for news; once Ray has ended, their next question would start another one.
_NO_OTHER_RAY = {"RAY_ENABLE_AUTO_CONNECT": "0"}


def new_ray_folder() -> Path:
    """A fresh temporary folder, its path short enough for the Unix sockets that Ray puts below it."""
    return Path(tempfile.mkdtemp(prefix="memorag-", dir="/tmp"))


def address_in(folder: Path) -> str:
    """The address of the Ray that was started with this folder, and lets this process pass there.

    As for `start_ray`, nothing may have imported Ray yet.
    """
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / _TOKEN), **_NO_OTHER_RAY}
    return (folder / _ADDRESS).read_text()


def start_ray(config: RayConfig, folder: Path) -> None:
    """Starts Ray and connects this process to it; it ends with this process, however that ends, and leaves nothing.

    Nothing may have imported Ray yet: it reads how to authenticate when it is imported.
    """
    if "ray" in sys.modules:
        raise RuntimeError("Ray is imported already, and would not see its token: start the server in a fresh process")
    watch_over(folder)
    (folder / "tmp").mkdir(exist_ok=True)
    token = folder / _TOKEN
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": str(folder / "tmp"),  # for all that Ray starts: vLLM leaves its sockets behind
        **_NO_OTHER_RAY,
        # Nothing of ours blocks its replica's event loop, so user code needs no thread of its own: less work a request.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.http.proxy:middlewares",
    }
    init_patiently(
        metrics=config.metrics,
        namespace=config.namespace,
        num_cpus=config.logical_cpus,
        object_store_memory=config.object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
        _system_config={
            "enable_metrics_collection": config.metrics,
            "worker_niceness": 0,
            "worker_register_timeout_seconds": _WORKER_START_S,
            "agent_register_timeout_ms": _WORKER_START_S * 1000,
        },
    )
    import ray

    (folder / _ADDRESS).write_text(ray.get_runtime_context().gcs_address)


def init_patiently(*, metrics: bool = True, **options: Any) -> None:
    """Starts a Ray of this process's own with `options` of `ray.init`, which exports `metrics` or does not.

    Its node is waited for while its process lives (`patient_node`). On a busy machine that may give itself up, for its
    own limits on what it starts: it is begun again.
    """
    import ray
    from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

    from cluster.ray_internals import patient_node, small_node

    for attempt in Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        retry=retry_if_exception_message(match=".*timed out during startup"),  # Ray raises no class of its own here
        before_sleep=lambda _: logger.warning("Ray's node ended before it was ready; it is started again"),
        reraise=True,
    ):
        with attempt, patient_node(), small_node(metrics=metrics):
            try:
                ray.init("local", **options)
            except BaseException:
                ray.shutdown()
                raise


def stop_ray(folder: Path) -> None:
    """Ends the Ray that `start_ray` started, with all that it started, and deletes its folder."""
    import ray

    shared = shared_memory_of(find_processes(folder))  # before Ray kills them: later nothing says whose it was
    ray.shutdown()
    remove_traces(folder, shared)
    os.environ.pop("TMPDIR", None)  # it is gone
