"""A pool is a named set of GPUs (or CPUs) that one kind of model runs on; each deployment belongs to one."""

from typing import Any

from pydantic import Field, model_validator

from cluster.config import Settings


class ScalingConfig(Settings):
    """When a pool with room for more replicas takes them, and gives them back: see `pools.autoscaling`."""

    ongoing_requests: float | None = Field(
        None, gt=0, description="requests one replica should have; none takes half of max_ongoing_requests"
    )
    queued_tokens: float = Field(500_000, gt=0, description="tokens of texts one Memorizer should have before it")
    kv_cache_level: float = Field(0.8, gt=0, description="share of an engine's KV cache that should be in use")
    queue_s: float = Field(0.25, gt=0, description="seconds that texts should wait for an Embedder")
    upscale_delay_s: float = Field(10.0, ge=0, description="seconds of higher demand before replicas are added")
    downscale_delay_s: float = Field(300.0, ge=0, description="seconds of lower demand before replicas are taken away")


class PoolConfig(Settings):
    """What one replica on this pool takes, and how many replicas there may be."""

    accelerator_type: str | None = Field(
        None, description="Ray accelerator type the replicas need, such as H100; none means any"
    )
    gpus_per_replica: float = Field(0.0, ge=0, description="GPUs of one replica; fractions share a GPU")
    cpus_per_replica: float = Field(1.0, gt=0, description="logical CPUs of one replica")
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources of one replica; they place the pool on its nodes"
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels that the pool's nodes have, such as ray.io/node-group: gpu"
    )
    min_replicas: int = Field(1, ge=0, description="replicas kept when idle")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    max_ongoing_requests: int = Field(256, ge=1, description="requests one replica works on at a time")
    drain_s: float = Field(30.0, ge=0, description="seconds a replica that is taken away may finish its requests")
    scaling: ScalingConfig = ScalingConfig()

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "PoolConfig":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is more than max_replicas ({self.max_replicas}): raise the latter"
            )
        return self

    def actor_options(self) -> dict[str, Any]:
        """`ray_actor_options` of a deployment on this pool."""
        options: dict[str, Any] = {
            "num_cpus": self.cpus_per_replica,
            "num_gpus": self.gpus_per_replica,
            "resources": dict(self.resources),
        }
        if self.accelerator_type:
            options["accelerator_type"] = self.accelerator_type
        if self.node_labels:
            options["label_selector"] = dict(self.node_labels)
        return options

    def deployment_options(
        self, *, amounts: dict[str, float] | None = None, levels: dict[str, float] | None = None
    ) -> dict[str, Any]:
        """Options of a Serve deployment on this pool: a fixed number of replicas, or an autoscaled one.

        `amounts` and `levels` are what its replicas report beside requests: see `pools.autoscaling`.
        """
        options: dict[str, Any] = {
            "ray_actor_options": self.actor_options(),
            "max_ongoing_requests": self.max_ongoing_requests,
            # Serve's proxy logs each HTTP request; a line more at every hop behind it tells nothing and costs time.
            "logging_config": {"enable_access_log": False},
            # How soon a replica that died is replaced; how long one that is only busy is believed.
            "health_check_period_s": 1.0,
            "health_check_timeout_s": 30.0,
            "graceful_shutdown_timeout_s": self.drain_s,
        }
        if self.min_replicas == self.max_replicas:
            options["num_replicas"] = self.max_replicas
            return options
        requests = self.scaling.ongoing_requests or max(1.0, self.max_ongoing_requests / 2)
        options["autoscaling_config"] = {
            "min_replicas": self.min_replicas,
            "max_replicas": self.max_replicas,
            "upscale_delay_s": self.scaling.upscale_delay_s,
            "downscale_delay_s": self.scaling.downscale_delay_s,
            "policy": {
                "policy_function": "cluster.pools.autoscaling:DemandPolicy",
                "policy_kwargs": {"requests": requests, "amounts": amounts or {}, "levels": levels or {}},
            },
        }
        return options
