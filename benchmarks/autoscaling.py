"""Replicas that come and go with the load: a server whose pools may grow, under few clients, many, and few again.

    python -m benchmarks.autoscaling [--json FILE] [--plot docs/autoscaling.svg]

The `embedded` profile on this machine, but its retrieval and cpu pools may have three replicas of each deployment and
its generator pool two, with targets and delays small enough for minutes. On a machine with fewer cores than replicas
more of them answer no faster: what is shown is that the policy follows the load, and that no request fails while
replicas come and go.
"""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.report import make_parser, report, say
from benchmarks.support.town import memorize_town
from cluster.pools.pools import ScalingConfig
from cluster.svg import Axis, Drawing, thin_out
from serving.config import APPLICATION, Profile, load_profile
from serving.deploy.temporary import measure_on_server

PHASES = ((1, 45.0), (24, 240.0), (1, 210.0))  # clients, seconds
EVERY_S = 3.0
WIDTH, HEIGHT, DOTS = 720, 460, 300  # of the picture
COLOURS = ("#1f6f8b", "#c06014", "#5c8d3d", "#7a5195", "#333333")
MOST = {"Embedder": 3, "Retriever": 3, "Router": 3, "Ingress": 3, "Generator": 2}


@dataclass
class Seen:
    """What was seen over time; seconds since the beginning."""

    at: list[float] = field(default_factory=list)
    replicas: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in MOST})
    latency_at: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    failed: int = 0


def settings() -> Profile:
    profile = load_profile("embedded")
    scaling = ScalingConfig(ongoing_requests=6, upscale_delay_s=5, downscale_delay_s=30, queue_s=0.05)
    grown = {"max_replicas": 3, "scaling": scaling}
    pools = profile.pools.model_copy(
        update={
            "cpu": profile.pools.cpu.model_copy(update=grown),
            "retrieval": profile.pools.retrieval.model_copy(update=grown),
            "generator": profile.pools.generator.model_copy(update=grown | {"max_replicas": 2}),
        }
    )
    return profile.model_copy(
        update={"pools": pools, "ray": profile.ray.model_copy(update={"logical_cpus": 32, "metrics": True})}
    )


async def clients(http: aiohttp.ClientSession, number: int, seconds: float, began: float, seen: Seen) -> None:
    ends = time.monotonic() + seconds

    async def client(which: int) -> None:
        asked = 0
        while time.monotonic() < ends:
            asked += 1
            body = {"question": f"Client {which} asks {number} {asked}: who sailed?", "max_tokens": 16}
            start = time.monotonic()
            async with http.post("/v1/memories/town/answer", json=body) as response:
                if response.status != 200:
                    seen.failed += 1
                    await response.read()
                    await asyncio.sleep(0.5)
                    continue
                await response.read()
            seen.latency_at.append(time.monotonic() - began)
            seen.latency_s.append(time.monotonic() - start)

    async with asyncio.TaskGroup() as group:
        for which in range(number):
            group.create_task(client(which))


async def watch(began: float, seen: Seen) -> None:
    from ray import serve

    while True:
        deployments = (await asyncio.to_thread(serve.status)).applications[APPLICATION].deployments
        seen.at.append(time.monotonic() - began)
        for name, counts in seen.replicas.items():
            counts.append(deployments[name].replica_states.get("RUNNING", 0))
        await asyncio.sleep(EVERY_S)


async def run(address: str) -> Seen:
    seen = Seen()
    async with aiohttp.ClientSession(address, timeout=aiohttp.ClientTimeout(600)) as http:
        await memorize_town(http)
        began = time.monotonic()
        watching = asyncio.create_task(watch(began, seen))
        for number, seconds in PHASES:
            say(f"{number} clients for {seconds:.0f} s")
            await clients(http, number, seconds, began, seen)
        watching.cancel()
    return seen


def rows_of(seen: Seen) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rows, start = [], 0.0
    for number, seconds in PHASES:
        inside = [i for i, at in enumerate(seen.at) if start <= at < start + seconds]
        times = [s for s, at in zip(seen.latency_s, seen.latency_at, strict=True) if start <= at < start + seconds]
        row: dict[str, Any] = {
            "clients": number,
            "seconds": seconds,
            "questions": len(times),
            "median (s)": statistics.median(times),
        }
        rows.append(row | {name: _span([counts[i] for i in inside]) for name, counts in seen.replicas.items()})
        start += seconds
    grew = [max(counts) for counts in seen.replicas.values()]
    shrank = [counts[-1] for counts in seen.replicas.values()]
    return rows, {"most_replicas": sum(grew), "replicas_at_the_end": sum(shrank), "failed_requests": seen.failed}


def _span(counts: Sequence[int]) -> str:
    return f"{counts[0]} → {counts[-1]}" if counts[0] != counts[-1] else str(counts[0])


def plot(seen: Seen, path: Path) -> None:
    """Replicas above, seconds of questions (a sample of them) below, both over time."""
    picture, left, right = Drawing(WIDTH, HEIGHT), 60, WIDTH - 110
    x = Axis(0, sum(seconds for _, seconds in PHASES), left, right)
    running = Axis(0, max(MOST.values()), 200, 20)
    low, high = min(seen.latency_s), max(seen.latency_s)
    took = Axis(low, high, HEIGHT - 50, 230, log=True)
    at = 0.0
    for number, seconds in PHASES:
        colour = "#fbe9e9" if number > 1 else "#fff"
        picture.add("rect", x=x(at), y=20, width=x(seconds) - x(0), height=HEIGHT - 70, fill=colour)
        picture.text(x(at) + 4, 224, f"{number} client{'s' * (number > 1)}")
        picture.text(x(at), HEIGHT - 32, f"{at:.0f}", "middle")
        at += seconds
    for count in range(max(MOST.values()) + 1):
        picture.line(left, running(count), right, running(count))
        picture.text(left - 8, running(count) + 4, f"{count}", "end")
    for value in (low, (low * high) ** 0.5, high):
        picture.line(left, took(value), right, took(value))
        picture.text(left - 8, took(value) + 4, f"{value:.2g} s", "end")
    for place, (name, counts) in enumerate(seen.replicas.items()):
        points = [(seen.at[0], counts[0])]
        for since, before, count in zip(seen.at[1:], counts, counts[1:], strict=False):
            points += [(since, before), (since, count)] if count != before else []
        points.append((seen.at[-1], counts[-1]))
        lift = 2.0 * place  # else equal curves would hide each other
        picture.curve([(x(since), running(count) - lift) for since, count in points], COLOURS[place])
        picture.text(right + 10, 34 + 18 * place, name, fill=COLOURS[place])
    for since, seconds in thin_out([*zip(seen.latency_at, seen.latency_s, strict=True)], DOTS):
        picture.add("circle", cx=x(since), cy=took(seconds), r=1.5, fill="#888")
    picture.text(right + 10, running(0) + 4, "replicas running")
    picture.text(right + 10, took(low) + 4, "of a question")
    picture.text((left + right) / 2, HEIGHT - 12, "seconds", "middle")
    path.write_text(picture.render(), encoding="utf-8")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--plot", type=Path, help="SVG file of replicas and latencies over time")
    arguments = parser.parse_args()
    seen = measure_on_server(settings(), lambda address, _: run(address))
    rows, ratios = rows_of(seen)
    report("autoscaling", rows, ratios, arguments.json)
    if arguments.plot:
        plot(seen, arguments.plot)


if __name__ == "__main__":
    main()
