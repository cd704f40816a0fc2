"""A pool is a named set of GPUs (or CPUs) that one kind of model runs on; each deployment belongs to one."""

from typing import Any

from pydantic import Field

from cluster.config import Settings


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
    min_replicas: int = Field(1, ge=0, description="replicas kept when idle")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    max_ongoing_requests: int = Field(256, ge=1, description="requests one replica works on at a time")

    def actor_options(self) -> dict[str, Any]:
        """`ray_actor_options` of a deployment on this pool."""
        options: dict[str, Any] = {
            "num_cpus": self.cpus_per_replica,
            "num_gpus": self.gpus_per_replica,
            "resources": dict(self.resources),
        }
        if self.accelerator_type:
            options["accelerator_type"] = self.accelerator_type
        return options

    def deployment_options(self) -> dict[str, Any]:
        """Options of a Serve deployment on this pool: a fixed number of replicas, or an autoscaled one."""
        options: dict[str, Any] = {
            "ray_actor_options": self.actor_options(),
            "max_ongoing_requests": self.max_ongoing_requests,
            # Serve's proxy logs each HTTP request; a line more at every hop behind it tells nothing and costs time.
            "logging_config": {"enable_access_log": False},
            # How soon a replica that died is replaced; how long one that is only busy is believed.
            "health_check_period_s": 1.0,
            "health_check_timeout_s": 30.0,
            # A replica that is replaced finishes what it is at, for so long.
            "graceful_shutdown_timeout_s": 30.0,
        }
        if self.min_replicas == self.max_replicas:
            options["num_replicas"] = self.max_replicas
        else:
            options["autoscaling_config"] = {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": max(1, self.max_ongoing_requests // 2),
            }
        return options
