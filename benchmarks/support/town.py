"""The example chronicle as a memory of a server, over HTTP: what several benchmarks ask of."""

from pathlib import Path

import aiohttp

EXAMPLE = Path(__file__).parents[2] / "examples" / "chronicle.txt"
TOWN = "town"  # the memory's id


async def memorize_town(http: aiohttp.ClientSession) -> None:
    """Makes the memory, and returns when it is ready."""
    text = EXAMPLE.read_text(encoding="utf-8")
    async with http.post("/v1/memories", json={"id": TOWN, "documents": [{"text": text}]}) as response:
        response.raise_for_status()
    async with http.get(f"/v1/memories/{TOWN}/events") as events:
        if "event: ready" not in await events.text():
            raise RuntimeError("the example could not be memorized")
