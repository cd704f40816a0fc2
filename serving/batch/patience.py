"""How long a batch waits for a server that says "not now": asked of the Routers by a run, over HTTP by many files."""

from typing import Any

from tenacity import retry_if_exception, stop_before_delay, wait_random_exponential

_NOT_NOW = (429, 503)


def until_ready(patience_s: float) -> dict[str, Any]:
    """Options of tenacity: calls again what failed with one of those statuses, for no longer than `patience_s`."""
    return {
        "retry": retry_if_exception(lambda error: getattr(error, "status", None) in _NOT_NOW),
        "stop": stop_before_delay(patience_s),
        "wait": wait_random_exponential(multiplier=1.0, max=30.0, min=0.5),
        "reraise": True,
    }
