"""Runs the benchmarks one after another and writes benchmarks/RESULTS.md: `make bench`, or `python -m benchmarks`.

python -m benchmarks [NAME …]      only these; the others' figures stay as they are in benchmarks/results/
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import cell

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
TARGETS = {
    "recall": {"speedup": "≥ 8"},
    "load": {"disk_over_memorize": "≥ 30"},
    "first_token": {},
    "moved": {"warm, bytes over slots": "0", "storage, bytes over slots": "1", "other node, bytes over slots": "1"},
    "pipeline": {"over_first_sketch_16": "≥ 2"},
    "memorize": {"time_per_flop_1M_over_10k": "0.7 to 1.3"},
    "ranks": {
        **{f"counted_over_predicted_ratio_{ratio}": "1" for ratio in (32, 8)},
        **{f"difference_ratio_{ratio}": "≤ 1e-4" for ratio in (32, 8)},
    },
    "corpus": {},
    "chronicles": {
        "answer_exact_match": "≥ 0.80",
        "clue_contains_span": "≥ 0.60",
        "recall_at_3, gained": "≥ 0",
        "two_step_recall_at_3, gained": "≥ 0.10",
        "emptied_memory_exact_match": "chance",
    },
    "batch": {},
    "autoscaling": {"failed_requests": "0"},
    "plan": {},
    "manifests": {"router_1000_over_1": "≤ 1.10", "bytes_1000_over_1": "≤ 1.10", "sent_1000_over_1": "≤ 1.10"},
    "start": {"wall_s": "≤ 35 on two quiet cores"},
    "routing": {"hits": "≥ 0.95, out of reach: best_without_foresight", "highest_load_of_all_runs": "≤ 1.25"},
}


def page() -> str:
    """RESULTS.md from the JSON files that are there."""
    lines = [
        "# Measurements",
        "",
        "Each benchmark runs its baseline in the same run; ratios are what is claimed. This page is written by "
        "`make bench` from `benchmarks/results/*.json`. Memory and language models here are the small `embedded` ones.",
    ]
    for name, targets in TARGETS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        about = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").strip().splitlines()[0]
        lines += ["", f"## {name}", "", about, "", f"`python -m benchmarks.{name}` on {result['machine']}", ""]
        lines += _table(result["rows"])
        lines += ["", "| ratio | measured | target |", "|---|---|---|"]
        lines += [f"| `{key}` | {cell(value)} | {targets.get(key, '')} |" for key, value in result["ratios"].items()]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or TARGETS:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(RESULTS / f"{name}.json")]
        subprocess.run(command, check=True, cwd=FOLDER.parent)
    (FOLDER / "RESULTS.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
