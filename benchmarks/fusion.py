"""What grounding is worth: the clues of a run of `memorag evaluate`, fused with the question in several ways.

    python -m benchmarks.fusion DATASET OUT [--profile embedded] [--json FILE]

DATASET and OUT as they were given to `memorag evaluate`, and the profile, whose passages and index are used. Recall is
that of the fused order, without the rule that the question's best passage is always kept. No model is asked but the
embedder. The baseline is plain reciprocal-rank fusion, in which every clue counts as much as the question, with k = 60
as in its paper and with the profile's k.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality import KS, documents
from benchmarks.report import make_parser, report
from retrieval_worker.config import RetrievalConfig
from retrieval_worker.embedders import load_embedder
from retrieval_worker.fusion import clue_weights, fuse
from retrieval_worker.messages import Hit, Passage, Ranking
from serving.config import load_profile
from serving.evaluation.datasets import Example, read_examples
from serving.evaluation.recall import Found, evidence_recall

PAPERS_K = 60


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--profile", default="embedded")
    arguments = parser.parse_args()
    config = load_profile(arguments.profile).retrieval
    k = config.search.rrf_k
    ways: dict[str, Callable[[list[Ranking]], list[Hit]]] = {
        "the question alone": lambda found: fuse(found[:1], [1.0], k),
        f"all alike, k = {PAPERS_K}": lambda found: fuse(found, [1.0] * len(found), PAPERS_K),
        f"all alike, k = {k}": lambda found: fuse(found, [1.0] * len(found), k),
        f"clues by grounding, k = {k}": lambda found: fuse(found, clue_weights(found, found[0].grounding), k),
    }
    recalls: dict[str, list[list[float]]] = {way: [] for way in ways}
    for example, rankings in _rankings(arguments.dataset, arguments.out / "rows.jsonl", config):
        for way, fused in ways.items():
            best = [Found(hit.passage.start, hit.passage.end, hit.score) for hit in fused(rankings)]
            recalls[way].append([evidence_recall(example, best, k) or 0.0 for k in KS])
    rows: list[dict[str, Any]] = []
    for way, each in recalls.items():
        means = [sum(column) / len(each) for column in zip(*each, strict=True)]
        figures = {f"evidence@{k}": mean for k, mean in zip(KS, means, strict=True)}
        rows.append({"dataset": arguments.dataset.name, "way": way, "n": len(each), **figures})
    ratios = {f"grounding - {row['way']}, evidence@3": rows[-1]["evidence@3"] - row["evidence@3"] for row in rows[:-1]}
    report("fusion", rows, ratios, arguments.json)


def _rankings(dataset: Path, rows: Path, config: RetrievalConfig) -> Iterator[tuple[Example, list[Ranking]]]:
    """Of each example that was asked, and has evidence, the rankings of its question and of its clues."""
    run = [json.loads(line) for line in rows.read_text().splitlines()]
    clues = {row["example"]: row["clues"] for row in run if row["method"] == "memorag" and "error" not in row}
    model = load_embedder(config.embedder)
    wanted = [example for example in read_examples(dataset) if example.id in clues and example.evidence]
    for asked, document in documents(wanted, model, config.passages):
        index = document.index(config.index)
        places = enumerate(zip(document.slices, document.texts, strict=True))
        passages = [Passage(n, "", "", *ends, text, 0) for n, (ends, text) in places]
        for example in asked:
            queries = [example.question, *clues[example.id]]
            embedded = model.encode([model.query_prompt + query for query in queries])
            rankings = []
            for row, query in enumerate(queries):
                found = index.search(query, embedded, row, config.search.hits_per_query)
                hits = tuple(Hit(passages[id], score) for id, score in found)
                rankings.append(Ranking(hits, index.measure_grounding(query, embedded, row)))
            yield example, rankings


if __name__ == "__main__":
    main()
