"""The profiles that cannot run here are built into application graphs, up to the point where Ray would place them."""

import os
import subprocess
import sys

import pytest

from serving.config import profile_names

BUILD = """
import sys, tempfile
from pathlib import Path
from serving.deploy.local_ray import start_ray, stop_ray
from serving.config import RayConfig, load_profile
folder = Path(tempfile.mkdtemp(prefix="dry-", dir="/tmp"))
start_ray(RayConfig(logical_cpus=2, object_store_bytes=100 * 2**20, metrics=False), folder)
from ray.serve._private.build_app import build_app
from memory_worker.catalog.quotas import Quota
from serving.deploy.app import build, resolve_models
for name in sys.argv[1:]:
    profile = resolve_models(load_profile(name))
    graph = build_app(build(profile, str(folder / "memories")), name=name)
    for deployment in graph.deployments:
        options = deployment.ray_actor_options or {}
        bundles = deployment._replica_config.placement_group_bundles
        print("version", name, deployment.name, deployment._version)
        print(name, deployment.name, options.get("num_gpus", 0), options.get("resources", {}), bundles, sep="|")
    limits = profile.quotas.model_copy(update={"tenants": {"acme": Quota(jobs=1)}})
    other = build(profile.model_copy(update={"quotas": limits}), str(folder / "memories"))
    for deployment in build_app(other, name="other").deployments:
        print("changed", name, deployment.name, deployment._version)
print("imported", *{"torch", "vllm"}.intersection(sys.modules))
stop_ray(folder)
"""


@pytest.fixture(scope="module")
def output() -> list[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *profile_names()], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def graphs(output: list[str]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for line in output:
        if line.count("|") == 4:
            name, deployment, *rest = line.split("|")
            found.setdefault(name, {})[deployment] = rest
    return found


def test_every_profile_has_the_same_deployments(graphs):
    names = {"Ingress", "Router", "Memorizer", "Recaller", "Embedder", "Retriever", "Generator"}
    assert set(graphs) == set(profile_names())
    for name, deployments in graphs.items():
        assert set(deployments) == names, name


def test_a_changed_profile_replaces_only_what_reads_the_change(output: list[str]):
    for name in profile_names():
        before, after = (
            {line.split()[2]: line.split()[3] for line in output if line.startswith(f"{kind} {name} ")}
            for kind in ("version", "changed")
        )
        assert len(before) == 7 and len(set(before.values())) == 7
        assert {part for part in before if before[part] != after[part]} == {"Router", "Ingress"}, name


def test_deploying_imports_neither_torch_nor_vllm(output: list[str]):
    assert output[-1] == "imported"


def test_the_cluster_keeps_its_pools_apart(graphs):
    cluster = graphs["cluster"]
    assert "memory_pool" in cluster["Memorizer"][1] and "memory_pool" in cluster["Recaller"][2]
    assert "retrieval_pool" in cluster["Embedder"][1] and "generator_pool" in cluster["Generator"][2]
    assert cluster["Generator"][2].count("'GPU'") == 2, "two GPUs for tensor parallelism"
    assert cluster["Router"][1] == "{}"


def test_the_embedded_profile_asks_for_no_gpu(graphs):
    assert all("'GPU': 1" not in str(parts) and parts[0] in ("0", "0.0") for parts in graphs["embedded"].values())
