"""The metrics that exist: what our code, Ray Serve, Ray's agents, autoscaler and core declare in their sources."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import promql_parser
import ray

ROOT = Path(__file__).parents[2]
RAY = Path(ray.__file__).parent
OURS = [
    path
    for room in ("cluster", "memory_worker", "retrieval_worker", "generator_worker", "serving")
    for path in (ROOT / room).rglob("*.py")
]
SERVE = list((RAY / "serve").rglob("*.py"))
AGENT = [RAY / "dashboard/modules/reporter/reporter_agent.py"]
TAGS = RAY / "dashboard/consts.py"  # the labels of those
AUTOSCALER = [RAY / "autoscaler/_private/prom_metrics.py"]
CORE = [RAY / "core/src/ray/gcs/gcs_server", RAY / "core/src/ray/raylet/raylet"]
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count", "_sum")}
EVERYWHERE = {"instance", "job", "le"}  # what Prometheus adds
BY_SERVE = {"application", "deployment", "replica"}  # what Serve adds to each metric of a replica


@dataclass(frozen=True)
class Metric:
    """A series as it is scraped, and the labels that it may have; None where they cannot be told from the source."""

    name: str
    labels: frozenset[str] | None


@dataclass(frozen=True)
class Use:
    """A series that an expression reads, with the labels it matches, and those that the whole expression groups by."""

    name: str
    labels: frozenset[str]


@functools.cache
def declared() -> dict[str, Metric]:
    """By name, all that can be found in Python sources."""
    found: dict[str, Metric] = {}
    for files, prefix, added in (
        (OURS, "ray_", set()),
        (SERVE, "ray_", BY_SERVE),
        (AGENT, "ray_", set()),
        (AUTOSCALER, "autoscaler_", set()),
    ):
        for file in files:
            text = (TAGS.read_text(encoding="utf-8") if files is AGENT else "") + file.read_text(encoding="utf-8")
            if not any(f"{kind}(" in text for kind in SUFFIXES):
                continue
            for kind, name, labels in _declarations(ast.parse(text)):
                for suffix in SUFFIXES[kind]:
                    full = f"{prefix}{name.removesuffix('_total') if suffix == '_total' else name}{suffix}"
                    found[full] = Metric(full, frozenset(labels | added))
    return found


def is_of_ray_core(name: str) -> bool:
    """Whether Ray's C++ programs know a metric of that name: gauges by it, counters without their suffix."""
    bare = name.removeprefix("ray_").removesuffix("_total").encode()
    return any(b"\0" + bare + b"\0" in path.read_bytes() for path in CORE)


def uses(expression: str) -> list[Use]:
    """What a PromQL expression reads. Raises `ValueError` for one that is none."""
    return list(_uses(promql_parser.parse(expression), frozenset()))


def _uses(node: object, grouped: frozenset[str]) -> Iterator[Use]:
    modifier = getattr(node, "modifier", None)
    if isinstance(node, promql_parser.AggregateExpr) and modifier:
        grouped = grouped | frozenset(modifier.labels)
    if isinstance(node, promql_parser.VectorSelector):
        yield Use(node.name, grouped | frozenset(matcher.name for matcher in node.matchers.matchers))
    for part in ("lhs", "rhs", "expr", "vector_selector"):
        if (child := getattr(node, part, None)) is not None:
            yield from _uses(child, grouped)
    for child in getattr(node, "args", None) or []:
        yield from _uses(child, grouped)


def _declarations(tree: ast.Module) -> Iterator[tuple[str, str, set[str]]]:
    """Kind, name and labels of each `Counter("name", …)`, `Gauge` and `Histogram` in a module."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        kind = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "name")]
        if kind in SUFFIXES and given and (name := _name(given[0])):
            rest = [*call.args[2:], *(word.value for word in call.keywords if word.arg in ("tag_keys", "labelnames"))]
            yield kind, name, {label for node in rest for label in _strings(node, tree)}


def _name(node: ast.expr) -> str | None:
    """A literal string; in one with fields, which is how Serve names what it has for each protocol, HTTP's."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "http" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _strings(node: ast.expr, tree: ast.Module) -> Iterator[str]:
    """The strings in an expression, and in what is assigned in the same module to the names that it has."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
        elif isinstance(part, ast.Name):
            for other in ast.walk(tree):
                if isinstance(other, ast.Assign) and any(getattr(to, "id", None) == part.id for to in other.targets):
                    yield from _strings(other.value, tree)
