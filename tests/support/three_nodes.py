"""A server on a Ray cluster of three nodes of this machine, each of them the only one that its pools may run on.

To run the system tests on it:

python -m tests.support.three_nodes --storage FOLDER     # until Ctrl-C; then, in another terminal:
MEMORAG_TEST_STORAGE=FOLDER python -m pytest tests/system
"""

import argparse
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from ray.cluster_utils import Cluster

from cluster.ray_internals import patient_node
from tests.support.server import CLUSTER_PID, ROOT, Server
from tests.support.waiting import PATIENCE_S

# Which pools are on a node, and which deployments that are.
NODES: dict[str, dict[str, tuple[str, ...]]] = {
    "front_pool": {"cpu": ("Ingress", "Router"), "retrieval": ("Embedder", "Retriever")},
    "memory_pool": {"memory": ("Memorizer", "Recaller")},
    "generator_pool": {"generator": ("Generator",)},
}
_ROOM = 1000  # of a node's own resource, of which each replica takes one


@contextmanager
def three_nodes(storage: Path) -> Iterator[tuple[str, Path]]:
    """The cluster's address, and the embedded profile with its pools on its nodes. RAY_TMPDIR is its folder."""
    environment = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.http.proxy:middlewares"}
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="three", dir="/tmp") as folder, patient_node():
        Path(folder, "ray").mkdir()
        # Without RAY_TMPDIR every Ray on this machine would find this cluster; vLLM leaves its sockets in TMPDIR.
        os.environ |= environment | {"RAY_TMPDIR": folder, "TMPDIR": folder}
        cluster = Cluster()
        try:
            for name in NODES:
                cluster.add_node(
                    num_cpus=6,
                    resources={name: _ROOM},
                    object_store_memory=300 * 2**20,
                    include_dashboard=False,
                    wait=False,  # it would be given up after 30 s
                )
                cluster.wait_for_nodes(PATIENCE_S)
            yield cluster.address, write_profile(storage, cluster.address)
        finally:
            cluster.shutdown()
            os.environ.clear()
            os.environ |= before


def write_profile(storage: Path, address: str, **resources: dict[str, float]) -> Path:
    """The embedded profile for that cluster; `resources` are those of pools that are to differ."""
    settings = yaml.safe_load((ROOT / "serving" / "profiles" / "embedded.yaml").read_text())
    settings["ray"] = {
        "address": address,
        "logs": "json",
        "tracing": {"enabled": True, "sampling_ratio": 1.0},
    }
    for node, pools in NODES.items():
        for pool in pools:
            settings["pools"].setdefault(pool, {})["resources"] = resources.get(pool, {node: 1})
    path = storage / "three-nodes.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True)
    storage: Path = parser.parse_args().storage
    storage.mkdir(parents=True, exist_ok=True)
    with three_nodes(storage) as (_, profile):
        (storage / CLUSTER_PID).write_text(str(os.getpid()))
        server = Server("", storage)
        print(server.memorag("up", "--profile", str(profile), "--port", "0").stdout, flush=True)
        example = ROOT / "examples" / "chronicle.txt"
        server.memorag("memorize", str(example), "--id", "chronicle", "--title", "A Town Chronicle")
        print(f"MEMORAG_TEST_STORAGE={storage} python -m pytest tests/system", flush=True)
        try:
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
        finally:
            server.memorag("down")
            (storage / CLUSTER_PID).unlink()


if __name__ == "__main__":
    main()
