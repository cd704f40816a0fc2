"""What a pool asks of Serve, and whether a cluster has it."""

import pytest
from ray.serve.config import AutoscalingConfig

from cluster.config import EngineConfig
from cluster.pools.placement import Node, PoolUnplaceable, ReplicaNeed, require_placeable
from cluster.pools.pools import PoolConfig, ScalingConfig

GPU_NODE = Node("10.0.0.2", {"CPU": 32, "GPU": 8, "accelerator_type:H100": 1, "memory_pool": 8})
CPU_NODE = Node("10.0.0.1", {"CPU": 16, "node:10.0.0.1": 1, "memory": 1e9}, {"ray.io/node-group": "front"})


def test_a_fixed_pool_has_a_number_of_replicas():
    pool = PoolConfig(min_replicas=2, max_replicas=2, gpus_per_replica=0.5, resources={"memory": 1}, drain_s=7)
    options = pool.deployment_options()
    assert options["num_replicas"] == 2 and "autoscaling_config" not in options
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5, "resources": {"memory": 1}}
    assert options["graceful_shutdown_timeout_s"] == 7


def test_a_pool_of_labelled_nodes_selects_them():
    pool = PoolConfig(node_labels={"ray.io/node-group": "front"})
    assert pool.actor_options()["label_selector"] == {"ray.io/node-group": "front"}


def test_a_pool_with_room_autoscales_between_its_bounds():
    pool = PoolConfig(
        min_replicas=0, max_replicas=8, max_ongoing_requests=64, scaling=ScalingConfig(downscale_delay_s=60)
    )
    options = pool.deployment_options(amounts={"queued_tokens": 1000})["autoscaling_config"]
    scaling = AutoscalingConfig(**options)  # Ray takes it as it is
    assert (scaling.min_replicas, scaling.max_replicas, scaling.downscale_delay_s) == (0, 8, 60)
    assert scaling.policy.policy_kwargs == {"requests": 32, "amounts": {"queued_tokens": 1000}, "levels": {}}


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match="min_replicas"):
        PoolConfig(min_replicas=2)


def test_ranks_of_an_engine_share_what_the_pool_gives_a_replica():
    from cluster.engine import _bundles

    engine = EngineConfig(model="m", tensor_parallel_size=4)
    assert (
        _bundles(engine, PoolConfig(gpus_per_replica=4, resources={"generator": 1}))
        == [{"GPU": 1.0, "generator": 0.25}] * 4
    )
    assert _bundles(EngineConfig(model="m"), PoolConfig(gpus_per_replica=0.5)) == [{"GPU": 0.5}]
    with pytest.raises(ValueError, match="gpus_per_replica to 4"):
        _bundles(engine, PoolConfig(gpus_per_replica=1))


def test_pools_that_fit_are_placeable():
    h100 = PoolConfig(gpus_per_replica=2, accelerator_type="H100", resources={"memory_pool": 1}, max_replicas=9)
    wide = PoolConfig(gpus_per_replica=4)
    needs = [ReplicaNeed.of("Recaller", "memory", h100), ReplicaNeed.of("Generator", "generator", wide, ranks=4)]
    front = ReplicaNeed.of("Ingress", "cpu", PoolConfig(node_labels={"ray.io/node-group": "front"}))
    require_placeable([*needs, front], [CPU_NODE, GPU_NODE])
    require_placeable(
        [ReplicaNeed.of("Generator", "generator", PoolConfig(gpus_per_replica=99, min_replicas=0))], [CPU_NODE]
    )


def test_an_engine_of_several_ranks_may_be_on_several_nodes():
    node = Node("a", {"CPU": 8, "GPU": 2})
    need = ReplicaNeed.of("Generator", "generator", PoolConfig(gpus_per_replica=4), ranks=4)
    require_placeable([need], [node, node])
    with pytest.raises(PoolUnplaceable, match=r"together: they need 4 GPU for generator \(Generator × 4\).*have 2"):
        require_placeable([need], [node])


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (PoolConfig(gpus_per_replica=16), r"'memory' cannot be placed: a replica of Recaller needs .*16 GPU"),
        (PoolConfig(resources={"gold": 1}), r"1 gold, and no node has that.*8 memory_pool.*change pools\.memory"),
        (PoolConfig(gpus_per_replica=1, accelerator_type="A100"), "accelerator_type:A100"),
        (PoolConfig(node_labels={"ray.io/node-group": "back"}), "the label ray.io/node-group=back"),
        (PoolConfig(gpus_per_replica=1, node_labels={"ray.io/node-group": "front"}), "1 GPU, the label"),
        (PoolConfig(gpus_per_replica=5, min_replicas=2, max_replicas=2), "together: they need 10 GPU"),
    ],
)
def test_a_pool_that_cannot_be_placed_says_what_is_missing(pool, words):
    with pytest.raises(PoolUnplaceable, match=words) as raised:
        require_placeable([ReplicaNeed.of("Recaller", "memory", pool)], [CPU_NODE, GPU_NODE])
    assert "10.0.0.1 (16 CPU, ray.io/node-group=front)" in str(raised.value)
