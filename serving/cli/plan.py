"""`memorag plan` and `memorag calibrate`: how large a cluster must be, from shapes and measured rates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.planning.costs import MemoryKind
from serving.cli.show import Json, Output

if TYPE_CHECKING:
    from cluster.planning.plan import CapacityPlan, Rates, Replica, Sizes
    from cluster.pools.pools import PoolConfig
    from serving.config import Profile

_CURVE = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the questions per second that are planned for


def calibrate(
    text: Annotated[Path, typer.Argument(help="A text such as yours: it is memorized and asked.", exists=True)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File for the rates, as JSON.")],
    profile: Annotated[str, typer.Option(help="Name of a profile, or a YAML file.")] = "embedded",
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each stage is measured.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Measure what each deployment does on this machine: starts a server of its own, and ends it."""
    out = Output(as_json)
    with _errors(out):
        from serving.planning.calibrate import Calibrated
        from serving.planning.calibrate import calibrate as measure

        def write(found: Calibrated) -> None:
            output.write_text(found.rates.model_dump_json(indent=1) + "\n", encoding="utf-8")
            out.facts(found.rates.model_dump())

        measure(profile, text.read_text(encoding="utf-8"), seconds=seconds, note=out.note, then=write)


def plan(
    rates: Annotated[Path, typer.Option(help="What 'memorag calibrate' wrote on a machine of the cluster's kind.")],
    memories: Annotated[int, typer.Option(min=1, help="Memories in all.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one memory.")],
    questions_per_second: Annotated[float, typer.Option(min=0.001, help="Questions asked of all of them.")],
    profile: Annotated[str, typer.Option(help="Name of a profile, or a YAML file.")] = "embedded",
    kind: Annotated[
        MemoryKind | None, typer.Option(help="Kind of memory; else the profile's, or the calibrated one.")
    ] = None,
    ratio: Annotated[int | None, typer.Option(min=1, help="Tokens per slot; else the profile's.")] = None,
    hours: Annotated[float, typer.Option(min=0.001, help="Hours in which all memories are to be made.")] = 24.0,
    hot: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the memories asked at a time.")] = 0.2,
    answer_tokens: Annotated[float | None, typer.Option(min=1, help="Of an answer; else as calibrated.")] = None,
    node_gpus: Annotated[int, typer.Option(min=1, help="GPUs of one node.")] = 8,
    node_cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs of one node.")] = 16,
    gpu_gb: Annotated[float, typer.Option(min=1, help="Memory of one GPU, in 10^9 bytes.")] = 80.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=FILE", help="config.json of a model that cannot be read or fetched here."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="File for the cost curves, as SVG.")] = None,
    as_json: Json = False,
) -> None:
    """GPUs, nodes, object store and storage that so many memories and questions take, and what binds first."""
    out = Output(as_json)
    with _errors(out):
        from cluster.planning.plan import Demand, Rates, curve
        from cluster.planning.plan import plan as planned
        from serving.config import load_profile
        from serving.planning.plan_curve import curve_svg

        settings = load_profile(profile)
        measured = Rates.model_validate_json(rates.read_text(encoding="utf-8"))
        files = dict(_shape_option(value) for value in shape or ())
        node = Node(node_gpus, node_cpus, gpu_gb * 1e9)
        sizes = sizes_of(settings, node, files)
        made = kind or settings.memory.memorize.kind or measured.memorize_kind
        demand = Demand(
            memories,
            tokens,
            questions_per_second,
            1 if made == "full" else ratio or settings.memory.memorize.ratio,
            made,
            hours=hours,
            hot=hot,
            answer_tokens=answer_tokens,
        )
        found = planned(demand, sizes, measured)
        if measured.profile != profile:
            out.note(f"the rates are those of the profile {measured.profile!r} on {measured.machine}")
        if measured.memorize_kind != made:
            out.note(f"memorizing was measured on {measured.memorize_kind} memories: what {made} takes is a guess")
        if svg:
            loads = [questions_per_second * share for share in _CURVE]
            svg.write_text(curve_svg(curve(demand, sizes, measured, loads)), encoding="utf-8")
        out.result(_as_json(found), _render(found, measured))


class Node:
    """One node of the cluster."""

    def __init__(self, gpus: int, cpus: int, gpu_bytes: float) -> None:
        self.gpus, self.cpus, self.gpu_bytes = gpus, cpus, gpu_bytes

    def replica(self, pool: "PoolConfig", ranks: int = 1) -> "Replica":
        """One replica on `pool`, or one of its `ranks`."""
        from cluster.planning.plan import Replica

        gpus, cpus = pool.gpus_per_replica / ranks, pool.cpus_per_replica
        fitting = self.gpus / gpus if gpus else self.cpus / cpus
        return Replica(gpus, cpus, max(1, int(fitting + 1e-9)))


def sizes_of(profile: "Profile", node: Node, files: "dict[str, Path]") -> "Sizes":
    """The profile in numbers; `files` are config.json of models by name. Raises `ValueError`."""
    from cluster.planning.plan import Sizes
    from serving.planning.shapes import read_shape

    memory, pools = profile.memory, profile.pools
    engine, generator = memory.engine, profile.generator.engine
    shape = read_shape(engine.model, files)
    if pools.memory.gpus_per_replica:
        kv = pools.memory.gpus_per_replica * node.gpu_bytes * engine.gpu_memory_utilization - shape.weight_bytes
    else:
        kv = float(engine.cpu_kv_cache_gib * 2**30)
    if kv <= 0:
        raise ValueError(
            f"the memory model's weights ({shape.weight_bytes / 1e9:.1f} GB) leave no room for a KV cache: raise "
            "pools.memory.gpus_per_replica, memory.engine.gpu_memory_utilization or --gpu-gb"
        )
    return Sizes(
        memory=shape,
        memorizer=node.replica(pools.memory, engine.ranks),
        ranks=memory.memorize.ranks,
        group_windows=memory.memorize.group_windows or 8,
        segment_slots=memory.group_slots,
        recaller=node.replica(pools.memory),
        kv_bytes=kv,
        keeper_bytes=float(memory.keeper.budget_bytes),
        retrieval=node.replica(pools.retrieval),
        generator=node.replica(pools.generator) if generator else None,
        router=node.replica(pools.cpu),
    )


def _shape_option(value: str) -> tuple[str, Path]:
    model, _, file = value.rpartition("=")
    if not model or not Path(file).is_file():
        raise ValueError(f"--shape takes MODEL=FILE, where FILE is that model's config.json; got {value!r}")
    return model, Path(file)


def _as_json(found: "CapacityPlan") -> dict[str, Any]:
    pools = [
        asdict(pool)
        | {"needs": [asdict(need) | {"fill": need.fill} for need in pool.needs], "binds": pool.binds.resource}
        for pool in found.pools
    ]
    binds = {"pool": found.binds.pool, "resource": found.binds.resource}
    return asdict(found) | {"pools": pools, "gpus": found.gpus, "nodes": found.nodes, "binds_first": binds}


def _render(found: "CapacityPlan", rates: "Rates") -> str:
    demand = found.demand
    lines = [
        f"{demand.memories:,} {demand.kind} memories of {demand.tokens:,} tokens at ratio {demand.ratio}, "
        f"{demand.questions_per_s:g} questions a second; rates of {rates.machine}",
        f"one memory: {found.slots:,} slots, {_bytes(found.memory_bytes)}, memorized in {found.memorize_s:,.1f} s",
        "",
    ]
    for pool in found.pools:
        lines.append(f"{pool.name}: {pool.gpus:g} GPUs, {pool.nodes} nodes; {pool.binds.resource} binds")
        lines += [
            f"  {need.resource:<12} {need.wanted:8.2f} of {need.given} {need.unit}s ({need.fill:.0%})"
            for need in pool.needs
        ]
    lines += [
        "",
        f"all pools: {found.gpus:g} GPUs, {found.nodes} nodes",
        f"object store: {_bytes(found.store_bytes)} of hot memories; storage: {_bytes(found.storage_bytes)}",
        f"binds first: {found.binds.resource} ({found.binds.pool} pool, {found.binds.fill:.0%} full)",
    ]
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


@contextmanager
def _errors(out: Output) -> Iterator[None]:
    """Expected errors become one line and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        out.error(str(error))
        raise typer.Exit(1) from None
