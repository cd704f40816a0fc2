"""How many replicas a deployment needs for the work there is: the policy of every autoscaled deployment.

Ray Serve's controller asks it a few times a second. Delays, smoothing and bounds are Serve's own, applied to what it
returns.
"""

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext


class DemandPolicy:
    """As many replicas as the scarcest of several things asks for.

    Three kinds of thing are counted:

    - **requests**, at work in replicas or waiting at a handle, against how many one replica should have;
    - **amounts**, which replicas report and which add up, such as tokens that are queued, against how much one replica
      should have. Requests that no replica has yet count as much each as those that replicas have, on average;
    - **levels**, which replicas report, such as the share of a KV cache that is taken, or the seconds that work waits:
      with the mean level at twice its target, twice the replicas are wanted, which is the sum of all over the target.
      What waits at a handle shows in them only once a replica has it.

    Replicas report through `record_autoscaling_stats`. With no replica, Serve starts one for the first request without
    asking.
    """

    def __init__(
        self, requests: float, amounts: Mapping[str, float] | None = None, levels: Mapping[str, float] | None = None
    ) -> None:
        """Targets for one replica; the names of `amounts` and `levels` are those that replicas report."""
        self._requests = requests
        self._amounts = amounts or {}
        self._levels = levels or {}

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas wanted, before Serve's rounding and bounds, and no state."""
        reported = {name: math.fsum(by.values()) for name, by in (context.aggregated_metrics or {}).items()}
        waiting = context.total_queued_requests or 0.0
        with_waiting = 1 + waiting / max(context.total_num_requests - waiting, 1.0)
        wanted = [context.total_num_requests / self._requests]
        wanted += [reported.get(name, 0.0) * with_waiting / target for name, target in self._amounts.items()]
        wanted += [reported.get(name, 0.0) / target for name, target in self._levels.items()]
        return max(wanted), {}
