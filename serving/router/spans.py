"""Stages of a question as OpenTelemetry spans, below the spans that Serve makes of its own calls.

Serve carries a trace from the proxy through every handle to the engines (`ray.tracing` in the profile turns that on);
here the pipeline adds what only it knows. Where nothing is traced the spans are OpenTelemetry's own that do nothing.
"""

import time
from collections.abc import Sequence

from opentelemetry import trace

from memory_worker.manifest import Manifest

_tracer = trace.get_tracer("memorag")


class StageSpans:
    """The spans of one question. Times are `time.perf_counter()` seconds."""

    def __init__(self, manifests: Sequence[Manifest], task: str) -> None:
        self._attributes = {
            "memorag.memory": [manifest.memory for manifest in manifests],
            "memorag.version": [manifest.version for manifest in manifests],
            "memorag.tenant": manifests[0].tenant,
            "memorag.task": task,
        }

    def end_stage(self, stage: str, began: float, **counts: int) -> None:
        """A stage that began then has ended now; `counts` say how much there was of what."""
        now, past = time.time_ns(), time.perf_counter() - began
        attributes = self._attributes | {f"memorag.{name}": count for name, count in counts.items()}
        span = _tracer.start_span(f"memorag.{stage}", start_time=now - int(past * 1e9), attributes=attributes)
        span.end(now)
