"""What a run has shown: figures of each method with their intervals, and each method against the first.

A question that a method failed to answer counts as answered wrong, and is counted as failed too.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.svg import Axis, Drawing
from serving.evaluation.bootstrap import difference, interval
from serving.evaluation.datasets import Example
from serving.evaluation.methods import Row
from serving.evaluation.recall import KS, Found, answer_recall, evidence_recall, rank_passages
from serving.evaluation.scores import exact, score

Values = dict[str, float]  # by example id
BASELINES = ("rag", "passages")  # what others are compared with, the first that is there
_WIDTH, _LEFT, _RIGHT, _ROW, _GAP, _TOP = 720, 150, 570, 20, 46, 48
_COLOURS = ("#1f6f8b", "#c06014", "#5c8d3d", "#7a5195", "#b5446e", "#666666", "#333333")


def report(examples: Sequence[Example], rows: Sequence[Row], methods: Sequence[str]) -> dict[str, Any]:
    """`{"baseline", "parts": {part: {figure: {method: interval}}}, "differences": the same, "methods": {method: …}}`.

    `parts` are the dataset's, and `all`. A figure is the dataset's metric, `exact`, `evidence@k` or `answer@k`;
    `differences` are paired, method - baseline: of recalls they are what a method's clues gained over the question.
    """
    by_method = {method: {row["example"]: row for row in rows if row["method"] == method} for method in methods}
    baseline = next((name for name in BASELINES if by_method.get(name)), next(iter(methods)))
    tasks = sorted({example.task for example in examples})
    parts = {task: [example for example in examples if example.task == task] for task in tasks}
    if len(tasks) != 1:
        parts["all"] = list(examples)
    found: dict[str, Any] = {"baseline": baseline, "parts": {}, "differences": {}, "methods": {}}
    known = {method: _figures(examples, answers) for method, answers in by_method.items()}
    for part, members in parts.items():
        documents = {example.id: example.document for example in members}
        means: dict[str, dict[str, Any]] = {}
        gains: dict[str, dict[str, Any]] = {}
        for method, figures in known.items():
            for name, values in figures.items():
                if mean := _interval(values, None, documents):
                    means.setdefault(name, {})[method] = mean
                other = known[baseline].get(name, {})
                if method != baseline and (gain := _interval(values, other, documents)):
                    gains.setdefault(name, {})[method] = gain
        found["parts"][part], found["differences"][part] = means, gains
    for method, answers in by_method.items():
        found["methods"][method] = _costs(list(answers.values()))
    return found


def report_svg(title: str, figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A panel for each of one part's figures, `{figure: {method: {mean, low, high, n}}}`, all 0 to 1; as SVG."""
    methods = list(dict.fromkeys(method for values in figures.values() for method in values))
    colours = {method: _COLOURS[place % len(_COLOURS)] for place, method in enumerate(methods)}
    picture = Drawing(_WIDTH, _TOP + sum(_GAP + _ROW * len(values) for values in figures.values()))
    picture.text(16, 28, title, font_size=15)
    x, top = Axis(0, 1, _LEFT, _RIGHT), _TOP
    for figure, values in figures.items():
        bottom = top + 18 + _ROW * len(values)
        picture.text(16, top + 10, figure, font_weight="bold")
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            picture.line(x(tick), top + 16, x(tick), bottom)
            picture.text(x(tick), bottom + 13, f"{tick:g}", "middle", fill="#777", font_size=10)
        for place, (method, value) in enumerate(values.items()):
            y, colour = top + 18 + _ROW * place + _ROW / 2, colours[method]
            picture.text(_LEFT - 10, y + 4, method, "end")
            if value["low"] is not None:
                picture.line(x(value["low"]), y, x(value["high"]), y, colour, stroke_width=2)
            picture.add("circle", cx=x(value["mean"]), cy=y, r=4, fill=colour)
            picture.text(_RIGHT + 14, y + 4, f"{value['mean']:.3f} (n = {value['n']})")
        top += _GAP + _ROW * len(values)
    return picture.render()


def _figures(examples: Sequence[Example], rows: Mapping[str, Row]) -> dict[str, Values]:
    """Every figure of every example that the method was asked."""
    values: dict[str, Values] = {}
    deepest = max((len(row.get("passages", ())) for row in rows.values()), default=0)
    for example in examples:
        if (row := rows.get(example.id)) is None:
            continue
        if row["method"] != "passages":
            measures = {example.metric: score} | ({"exact": exact} if example.metric == "f1" else {})
            for name, measure in measures.items():
                values.setdefault(name, {})[example.id] = measure(example, row["answer"]) if "answer" in row else 0.0
        best_first = rank_passages(
            [Found(int(start), int(end), found) for start, end, found in row.get("passages", ())]
        )
        for k in (k for k in KS if k <= deepest):
            for name, recall in (("evidence", evidence_recall), ("answer", answer_recall)):
                if (share := recall(example, best_first, k)) is not None:
                    values.setdefault(f"{name}@{k}", {})[example.id] = share
    return values


def _costs(rows: Sequence[Row]) -> dict[str, Any]:
    """Latency and tokens of what was answered; how much failed, and what the server said of its answers."""
    answered = [row for row in rows if "error" not in row]
    times = sorted(row["ms"] for row in answered if "ms" in row)
    notes = [note for row in answered for note in row.get("degraded", ())]
    return {
        "kinds": sorted({row["kind"] for row in rows}),
        "asked": len(rows),
        "failed": len(rows) - len(answered),
        "errors": sorted({row["error"] for row in rows if "error" in row})[:5],
        "clues": statistics.fmean(len(row.get("clues", ())) for row in answered) if answered else None,
        "ms_median": statistics.median(times) if times else None,
        "ms_p95": times[min(len(times) - 1, int(0.95 * len(times)))] if times else None,
        "tokens": statistics.fmean(row["tokens"] for row in answered if "tokens" in row) if times else None,
        "notes": {note: notes.count(note) for note in sorted(set(notes))},
    }


def _interval(one: Values, other: Values | None, documents: Mapping[str, str]) -> dict[str, Any] | None:
    """Of the mean of `one`, or of its difference to `other` where both have a value; none where no example has one."""
    ids = [id for id in one if id in documents and (other is None or id in other)]
    if not ids:
        return None
    names, values = [documents[id] for id in ids], [one[id] for id in ids]
    found = interval(values, names) if other is None else difference(values, [other[id] for id in ids], names)
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.count}
