"""`memorag plan` and `memorag calibrate`: how large a cluster must be, from shapes and measured rates."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from cluster.planning.costs import MemoryKind, PlanError
from serving.cli.options import ProfileName, with_output
from serving.cli.show import Output

if TYPE_CHECKING:
    from cluster.planning.plan import CapacityPlan, Rates

_ESTIMATE = (
    "ESTIMATE: nothing was measured. Rates are the peaks of data sheets times shares that are assumed to be reached",
    "(--json names each). Plan for twice as much, and measure on such a machine: memorag calibrate TEXT rates.json",
    "",
)
_CURVE = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the questions per second that are planned for
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 400, 64, 504, 48, 338
_COLOURS = {"memory": "#1f6f8b", "retrieval": "#c06014", "generator": "#5c8d3d", "cpu": "#7a5195", "all": "#333333"}


@with_output
def calibrate(
    out: Output,
    text: Annotated[Path, typer.Argument(help="A text such as yours: it is memorized and asked.", exists=True)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File for the rates, as JSON.")],
    profile: ProfileName = "embedded",
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each stage is measured.")] = 10.0,
) -> None:
    """Measure what each deployment does on this machine: starts a server of its own, and ends it."""
    from serving.planning.calibrate import Calibrated
    from serving.planning.calibrate import calibrate as measure

    def write(found: Calibrated) -> None:
        output.write_text(found.rates.model_dump_json(indent=1) + "\n", encoding="utf-8")
        out.facts(found.rates.model_dump())

    measure(profile, text.read_text(encoding="utf-8"), seconds=seconds, note=out.note, then=write)


@with_output
def plan(
    out: Output,
    memories: Annotated[int, typer.Option(min=1, help="Memories in all.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one memory.")],
    questions_per_second: Annotated[float, typer.Option(min=0.001, help="Questions asked of all of them.")],
    rates: Annotated[
        Path | None,
        typer.Option(
            help="What 'memorag calibrate' wrote on such a machine; without it, data sheets are counted with."
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Estimate with this GPU's data sheet: a100-80, h100, h200, l4, mi300x, ….")
    ] = None,
    profile: ProfileName = "embedded",
    kind: Annotated[
        MemoryKind | None, typer.Option(help="Kind of memory; else the profile's, the calibrated one, or its model's.")
    ] = None,
    ratio: Annotated[int | None, typer.Option(min=1, help="Tokens per slot; else the profile's.")] = None,
    hours: Annotated[float, typer.Option(min=0.001, help="Hours in which all memories are to be made.")] = 24.0,
    hot: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the memories asked at a time.")] = 0.2,
    answer_tokens: Annotated[float | None, typer.Option(min=1, help="Of an answer; else as calibrated.")] = None,
    node_gpus: Annotated[int, typer.Option(min=1, help="GPUs of one node.")] = 8,
    node_cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs of one node.")] = 16,
    gpu_gb: Annotated[
        float | None, typer.Option(min=1, help="Memory of one GPU, in 10^9 bytes; else its data sheet's.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=FILE", help="config.json of a model that cannot be read or fetched here."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="File for the cost curves, as SVG.")] = None,
) -> None:
    """GPUs, nodes, object store and storage that so many memories and questions take, and what binds first."""
    from cluster.planning.estimates import Assumptions
    from cluster.planning.plan import Demand, curve
    from cluster.planning.plan import plan as planned
    from serving.config import load_profile
    from serving.planning.sizes import NodeType, estimate_rates, kind_of, sizes_of

    if rates and gpu:
        raise typer.BadParameter("--rates are measured and --gpu is for an estimate without them: give one of the two")
    settings, files = load_profile(profile), dict(_shape_option(value) for value in shape or ())
    node = NodeType(node_gpus, node_cpus, gpu, gpu_gb and gpu_gb * 1e9)
    sizes = sizes_of(settings, node, files)
    measured = _read_rates(rates) if rates else None
    made = (
        kind
        or settings.memory.memorize.kind
        or (measured.memorize_kind if measured else kind_of(settings.memory.engine.model, files))
    )
    tokens_a_slot = 1 if made == "full" else ratio or settings.memory.memorize.ratio
    used = measured or estimate_rates(
        settings, profile, node, files, Assumptions(), kind=made, tokens=tokens, ratio=tokens_a_slot
    )
    demand = Demand(
        memories, tokens, questions_per_second, tokens_a_slot, made, hours=hours, hot=hot, answer_tokens=answer_tokens
    )
    found = planned(demand, sizes, used)
    if used.profile != profile:
        out.note(f"the rates are those of the profile {used.profile!r} on {used.machine}")
    if used.memorize_kind != made:
        out.note(f"memorizing was measured on {used.memorize_kind} memories: what {made} takes is a guess")
    if svg:
        loads = [questions_per_second * share for share in _CURVE]
        svg.write_text(_curve_svg(curve(demand, sizes, used, loads)), encoding="utf-8")
    basis: dict[str, Any] = {"estimate": measured is None, "rates": used.model_dump()}
    if measured is None:
        basis["assumptions"] = Assumptions().model_dump()
    out.result(basis | _as_json(found), _render(found, used, estimate=measured is None))


def _curve_svg(plans: "Sequence[tuple[float, CapacityPlan]]") -> str:
    """Nodes, or GPUs where there are any, of each pool over questions per second: at least two, ascending, log axes."""
    from cluster.svg import Axis, Drawing

    unit = "gpus" if plans[-1][1].gpus else "nodes"
    series: dict[str, list[float]] = {"all": [getattr(plan, unit) for _, plan in plans]}
    for index, pool in enumerate(plans[0][1].pools):
        series[pool.name] = [getattr(plan.pools[index], unit) for _, plan in plans]
    loads = [load for load, _ in plans]
    values = [value for line in series.values() for value in line if value]
    low, high = min(values), max(values)
    x, y = Axis(loads[0], loads[-1], _LEFT, _RIGHT, log=True), Axis(low, high, _BOTTOM, _TOP, log=True)

    picture, demand = Drawing(_WIDTH, _HEIGHT), plans[0][1].demand
    title = f"{demand.memories:,} memories of {demand.tokens:,} tokens, ratio {demand.ratio}"
    picture.text(_LEFT, 28, title, font_size=15)
    picture.add("rect", x=_LEFT, y=_TOP, width=_RIGHT - _LEFT, height=_BOTTOM - _TOP, fill="none", stroke="#999")
    picture.text((_LEFT + _RIGHT) / 2, _HEIGHT - 12, "questions per second", "middle")
    picture.text(16, _TOP - 8, "GPUs" if unit == "gpus" else unit)
    for load in loads:
        picture.text(x(load), _BOTTOM + 18, f"{load:g}", "middle")
    for value in sorted({low, math.sqrt(low * high), high}):
        picture.text(_LEFT - 8, y(value) + 4, f"{value:.3g}", "end")
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[name]
        picture.curve([(x(load), y(max(value, low))) for load, value in zip(loads, line, strict=True)], colour, 2)
        picture.text(_RIGHT + 14, _TOP + 16 + 20 * number, name, fill=colour)
    return picture.render()


def _read_rates(file: Path) -> "Rates":
    from pydantic import ValidationError

    from cluster.planning.plan import Rates

    try:
        return Rates.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise PlanError(f"{file} holds no rates ({what}): write it with 'memorag calibrate'") from None


def _shape_option(value: str) -> tuple[str, Path]:
    model, _, file = value.rpartition("=")
    if not model or not Path(file).is_file():
        raise PlanError(f"--shape takes MODEL=FILE, where FILE is that model's config.json; got {value!r}")
    return model, Path(file)


def _as_json(found: "CapacityPlan") -> dict[str, Any]:
    pools = [
        asdict(pool)
        | {"needs": [asdict(need) | {"fill": need.fill} for need in pool.needs], "binds": pool.binds.resource}
        for pool in found.pools
    ]
    binds = {"pool": found.binds.pool, "resource": found.binds.resource}
    return asdict(found) | {"pools": pools, "gpus": found.gpus, "nodes": found.nodes, "binds_first": binds}


def _render(found: "CapacityPlan", rates: "Rates", *, estimate: bool) -> str:
    demand, sizes = found.demand, (found.memory_bytes, found.store_bytes, found.storage_bytes)
    memory, store, storage = (decimal(int(size)) for size in sizes)
    lines = list(_ESTIMATE) if estimate else []
    lines += [
        f"{demand.memories:,} {demand.kind} memories of {demand.tokens:,} tokens at ratio {demand.ratio}, "
        f"{demand.questions_per_s:g} questions a second; rates of {rates.machine}",
        f"one memory: {found.slots:,} slots, {memory}, memorized in {found.memorize_s:,.1f} s",
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
        f"object store: {store} of hot memories; storage: {storage}",
        f"binds first: {found.binds.resource} ({found.binds.pool} pool, {found.binds.fill:.0%} full)",
    ]
    return "\n".join(lines)
