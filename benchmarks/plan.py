"""What `memorag plan` predicts from a calibration, against the same server doing it.

One `embedded` server on this machine. `calibrate` measures each deployment alone, on a text of a few thousand words.
Then the server memorizes a text three times as long, and answers other questions on the first from 16 clients over
HTTP:

    memorize    seconds of the Memorizer for that text, against counted FLOPs over the calibrated rate
    storage     bytes of everything its version has, against slots, characters and passages
    questions   a second, against the slowest stage alone or the machine's cores over the CPU seconds of all stages
    core time   CPU seconds of one question, all deployments: what the last stands on, and independent of other load

Figures are measured over predicted. The promise is 0.75 to 1.25.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

from benchmarks.report import make_parser, report, say
from benchmarks.support.town import EXAMPLE
from cluster.planning.plan import Demand, plan, shared_questions_per_s
from serving.config import load_profile
from serving.planning.calibrate import Calibrated, calibrate
from serving.planning.sizes import NodeType, sizes_of

TIMES = 3  # as long as the calibrated text
SECONDS = 12.0


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rates", type=Path, help="file for what was calibrated")
    arguments = parser.parse_args()
    text = EXAMPLE.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []

    def check(found: Calibrated) -> None:
        if arguments.rates:
            arguments.rates.write_text(found.rates.model_dump_json(indent=1) + "\n", encoding="utf-8")
        rows.extend(asyncio.run_coroutine_threadsafe(_check(found, text * TIMES), found.loop).result())

    calibrate("embedded", text, seconds=SECONDS, note=lambda line: say(line.removesuffix(" …")), then=check)
    ratios = {str(row["what"]): row["measured"] / row["predicted"] for row in rows}
    report("plan", rows, ratios, arguments.json)


async def _check(found: Calibrated, text: str) -> list[dict[str, Any]]:
    say("checking")
    stages = await found.stages.of_text("checked", text)
    manifest, rates = stages.manifest, found.rates
    (document,) = manifest.documents
    demand = Demand(1, document.tokens, 1.0, manifest.ratio)
    predicted = plan(demand, sizes_of(load_profile("embedded"), NodeType(1, os.cpu_count() or 1), {}), rates)
    memorized = 1 / (await stages.memorize(SECONDS)).per_s
    files = [manifest.head, document.source, document.passages]
    files += [file for segment in document.segments for file in segment.files]
    whole = await found.stages.answer(SECONDS)
    core_s = (
        rates.recall_core_s + rates.search_core_s + rates.answer_tokens * rates.generate_core_s + rates.route_core_s
    )
    everything = ("Recaller", "Embedder", "Retriever", "Generator", "Router", "Ingress")
    return [
        _row("memorize (s)", predicted.memorize_s, memorized),
        _row("storage (bytes)", predicted.storage_bytes, sum(file.size for file in files)),
        _row("questions per second", shared_questions_per_s(rates, os.cpu_count() or 1), whole.per_s),
        _row("core time of a question (s)", core_s, whole.core_s(*everything)),
    ]


def _row(what: str, predicted: float, measured: float) -> dict[str, Any]:
    return {"what": what, "predicted": predicted, "measured": measured}


if __name__ == "__main__":
    main()
