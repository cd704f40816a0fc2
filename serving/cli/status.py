"""`memorag status`: whether a server runs, and with `--live` how its pools, memories and rates are."""

import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from serving.cli.options import STORAGE, Storage, with_output
from serving.cli.show import Output

if TYPE_CHECKING:
    from serving.deploy.daemon import ServerState
    from serving.deploy.overview import Overview

_EVERY_S = 2.0


@with_output
def status(
    out: Output,
    storage: Storage = STORAGE,
    live: Annotated[
        bool, typer.Option("--live", help="Pools, replicas, memories and rates, until Ctrl-C; once where piped.")
    ] = False,
) -> None:
    """Say whether the server of a storage folder runs, where, since when, and what it holds."""
    from serving.deploy import daemon

    state = daemon.state_of(storage)
    if state is None or state.process() is None:
        hint = "it was killed; 'memorag down' removes what it left" if state else "start one with 'memorag up'"
        out.result({"running": False, "storage": str(storage)}, f"no server runs on {storage}; {hint}")
        raise typer.Exit(1)
    if live:
        _live(out, storage, state)
    else:
        out.facts(_facts(storage, state))


def _facts(folder: Path, state: "ServerState") -> dict[str, Any]:
    facts: dict[str, Any] = {
        "running": True,
        "address": state.address,
        "profile": state.profile,
        "pid": state.pid,
        "storage": str(folder),
        "uptime_s": round(time.time() - state.started),
    }
    if state.address:
        from serving.client.client import MemoRAG

        with MemoRAG(state.address, os.environ.get("MEMORAG_API_KEY"), timeout=30) as client:
            facts["memories"] = len(list(client.memories()))
            facts["busy"] = client.ready()["running"]
    return facts


def _live(out: Output, folder: Path, state: "ServerState") -> None:
    from serving.config import load_profile
    from serving.deploy.attach import attached

    profile = load_profile(state.profile)
    with attached(folder, None):
        from rich.live import Live

        from serving.deploy.overview import look

        seen = look(profile)
        if out.as_json or not out.on_terminal:
            threading.Event().wait(_EVERY_S)  # rates are between two looks
            seen = look(profile).since(seen)
            out.result(asdict(seen), _plain(seen))
            return
        try:
            with Live(table(seen), auto_refresh=False) as shown:
                while True:
                    threading.Event().wait(_EVERY_S)
                    seen = look(profile).since(seen)
                    shown.update(table(seen), refresh=True)
        except KeyboardInterrupt:
            return


def table(seen: "Overview") -> Group:
    """What was seen, for a terminal."""
    pools = Table("pool", "deployment", "running", "wanted", "at most", "status", title="MemoRAG")
    before = ""
    for each in seen.replicas:
        pool = each.pool if each.pool != before else ""
        before = each.pool
        colour = "green" if each.status == "HEALTHY" else "yellow"
        numbers = (str(each.running), str(each.wanted), str(each.most))
        pools.add_row(pool, each.deployment, *numbers, Text(each.status.lower(), style=colour))
    nodes = Table("node", "slots resident", "of its budget", "hits", "from peers", "from storage", "evicted")
    for node, kept in seen.keepers.items():
        share = f"{kept.bytes / 2**20:,.0f} of {kept.budget_bytes / 2**20:,.0f} MiB"
        counts = (f"{count:,}" for count in (kept.hits, kept.pulls, kept.loads, kept.evictions))
        nodes.add_row(node, f"{kept.slots:,}", share, *counts)
    return Group(pools, nodes, Text(_sums(seen)))


def _plain(seen: "Overview") -> str:
    from rich.console import Console

    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(table(seen))
    return captured.get().rstrip()


def _sums(seen: "Overview") -> str:
    totals = seen.totals
    lines = [
        f"{totals.memories:,} memories of {totals.tokens:,} tokens in {totals.slots:,} slots",
        f"{totals.running_jobs} jobs at work, {totals.waiting_jobs} waiting"
        + (f", {totals.done_tokens:,} of {totals.job_tokens:,} tokens done" if totals.job_tokens else ""),
    ]
    if seen.reads_per_s is not None and seen.memorized_tokens_per_s is not None:
        lines.append(
            f"{seen.reads_per_s:,.1f} memories read for questions a second, "
            f"{seen.memorized_tokens_per_s:,.0f} tokens memorized a second"
        )
    return "\n".join(lines)
