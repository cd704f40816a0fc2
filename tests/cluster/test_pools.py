from cluster.config import EngineConfig
from cluster.pools import PoolConfig


def test_a_fixed_pool_has_a_number_of_replicas():
    options = PoolConfig(
        min_replicas=2, max_replicas=2, gpus_per_replica=0.5, resources={"memory": 1}
    ).deployment_options()
    assert options["num_replicas"] == 2 and "autoscaling_config" not in options
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5, "resources": {"memory": 1}}


def test_a_pool_with_room_autoscales_between_its_bounds():
    scaling = PoolConfig(min_replicas=1, max_replicas=8, max_ongoing_requests=64).deployment_options()[
        "autoscaling_config"
    ]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 8, 32)


def test_ranks_of_an_engine_share_what_the_pool_gives_a_replica():
    import pytest

    from cluster.engine import _bundles

    engine = EngineConfig(model="m", tensor_parallel_size=4)
    assert (
        _bundles(engine, PoolConfig(gpus_per_replica=4, resources={"generator": 1}))
        == [{"GPU": 1.0, "generator": 0.25}] * 4
    )
    assert _bundles(EngineConfig(model="m"), PoolConfig(gpus_per_replica=0.5)) == [{"GPU": 0.5}]
    with pytest.raises(ValueError, match="gpus_per_replica to 4"):
        _bundles(engine, PoolConfig(gpus_per_replica=1))
