"""How every benchmark is called and reports: a table on the terminal, and rows with named ratios as JSON."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """Of a benchmark's options, with `--json`, which each has; `about` is its docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for rows and ratios")
    return parser


def say(line: str) -> None:
    """What is being done, beside the report."""
    print(f"{line} …", file=sys.stderr, flush=True)


def report(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    json_path: str | Path | None = None,
) -> None:
    """Prints `rows` (columns as in the first one, units in the column names) and `ratios`.

    With `json_path`, writes `{"benchmark", "machine", "rows", "ratios"}` there too.
    """
    table = Table(title=name)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(cell(row.get(column, "")) for column in columns))
    console = Console(width=None if os.isatty(1) else 160)
    console.print(table)
    for ratio, value in ratios.items():
        console.print(f"{ratio}: {cell(value)}", highlight=False)
    if json_path is not None:
        document = {"benchmark": name, "machine": machine(), "rows": list(rows), "ratios": dict(ratios)}
        Path(json_path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """The processor, its cores and the Python version, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    processor = model or platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}"


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
