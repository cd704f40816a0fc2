"""The serving room: profiles, the application graph, HTTP, clients and the command line.

`from serving import MemoRAG` is the Python client; it is imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client.client import MemoRAG

__all__ = ["MemoRAG"]


def __getattr__(name: str) -> Any:
    if name != "MemoRAG":
        raise AttributeError(f"module 'serving' has no attribute {name!r}")
    from serving.client.client import MemoRAG

    return MemoRAG
