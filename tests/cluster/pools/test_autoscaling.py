"""How many replicas the policy wants, asked as Serve's controller asks it."""

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.pools.autoscaling import DemandPolicy


def context(running: int, requests: float = 0, queued: float = 0, **reported: list[float]) -> AutoscalingContext:
    replicas = [f"replica {number}" for number in range(running)]
    metrics = {name: dict(zip(replicas, values, strict=True)) for name, values in reported.items()}
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="Memorizer",
        app_name="memorag",
        current_num_replicas=running,
        target_num_replicas=running,
        running_replicas=replicas,
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=100,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(min_replicas=0, max_replicas=100),
    )


def wanted(policy: DemandPolicy, *arguments, **reported) -> float:
    return policy(context(*arguments, **reported))[0]


def test_requests_alone():
    policy = DemandPolicy(requests=8)
    assert wanted(policy, 2, 40) == 5 and wanted(policy, 2, 0) == 0


def test_amounts_add_up_and_waiting_requests_count_as_much_as_those_at_work():
    policy = DemandPolicy(requests=100, amounts={"queued_tokens": 1000})
    assert wanted(policy, 2, 2, queued_tokens=[3000, 1000]) == 4
    # Two requests of 2,000 tokens are at work, two more wait.
    assert wanted(policy, 2, 4, 2, queued_tokens=[3000, 1000]) == 8


def test_levels_ask_for_what_brings_them_to_their_target():
    policy = DemandPolicy(requests=100, levels={"kv_cache_level": 0.8})
    assert wanted(policy, 4, 4, kv_cache_level=[1.0, 0.6, 0.8, 0.8]) == pytest.approx(4)
    assert wanted(policy, 2, 4, kv_cache_level=[1.6, 1.6]) == pytest.approx(4)
    assert wanted(policy, 4, 4, kv_cache_level=[0.2, 0.2, 0.2, 0.2]) == pytest.approx(1)


def test_the_scarcest_decides():
    policy = DemandPolicy(requests=10, amounts={"queued_tokens": 1000}, levels={"queue_s": 0.5})
    assert wanted(policy, 2, 90, queued_tokens=[500, 500], queue_s=[0.1, 0.1]) == 9
    assert wanted(policy, 2, 10, queued_tokens=[3000, 500], queue_s=[0.1, 0.1]) == 3.5
    assert wanted(policy, 2, 10, queued_tokens=[500, 500], queue_s=[2.0, 2.0]) == 8


def test_replicas_that_have_not_reported_yet_are_no_reason_for_anything():
    policy = DemandPolicy(requests=10, amounts={"queued_tokens": 1000}, levels={"queue_s": 0.5})
    assert wanted(policy, 1, 10) == 1 and wanted(policy, 0, 0) == 0
