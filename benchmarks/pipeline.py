"""What Router and Ingress cost over the engines alone, and questions per second from end to end.

    python -m benchmarks.pipeline [--json FILE] [--questions 160]

One `embedded` server on this machine. The baseline, in the same run, makes the same engine calls for the same
questions through deployment handles, from one process, with neither Router nor HTTP between: recall, one search for
the question and its clues, generation, evidence, one after another; their times are the sum of engine times. Every
question is asked once in each way, so no way profits from the other's prefix cache beyond the memory itself.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import aiohttp

from benchmarks.report import make_parser, report, say
from benchmarks.support.town import memorize_town
from serving.config import APPLICATION, load_profile
from serving.deploy.app import memories_root
from serving.deploy.temporary import measure_on_server

CLIENTS = (1, 16)
ANSWER_TOKENS = 32
SKETCH_QUESTIONS_PER_S = 5.7  # two engines on two cores, 16 clients: the first sketch of this system

Ask = Callable[[str], Awaitable[None]]


async def over_http(client: aiohttp.ClientSession, question: str) -> None:
    body = {"question": question, "max_tokens": ANSWER_TOKENS}
    async with client.post("/v1/memories/town/answer", json=body) as response:
        answer = await response.json()
    if answer.get("degraded") != ["embedded-model"]:
        raise RuntimeError(f"not a whole answer: {answer}")


def engines_alone(storage: str) -> Ask:
    """The calls of the pipeline to the engines, one stage after another, without Router and Ingress."""
    from ray import serve

    from generator_worker.messages import GenerateRequest, Generation, Source
    from memory_worker.messages import Clue, RecallRequest
    from memory_worker.recall.groups import segment_groups
    from memory_worker.storage.store import MemoryStore
    from retrieval_worker.fusion import clue_weights, select_hits
    from retrieval_worker.messages import EvidenceRequest
    from serving.router.pipeline import CLUE_KINDS
    from serving.router.versions import index_of

    profile, store = load_profile("embedded"), MemoryStore(memories_root(storage))
    key = store.current("default", "town")
    manifest = store.read_manifest(key)
    (memory,), index = segment_groups([manifest], profile.memory.group_slots), index_of([manifest])
    recaller, retriever, generator = (
        serve.get_deployment_handle(name, APPLICATION) for name in ("Recaller", "Retriever", "Generator")
    )
    search = profile.retrieval.search

    async def ask(question: str) -> None:
        asked = RecallRequest(memory, question, CLUE_KINDS["memorag"], "en")
        recalled = recaller.options(stream=True).recall.remote(asked)
        queries = [question] + [item.text async for item in recalled if isinstance(item, Clue)]
        found = await retriever.search.remote(index, queries)
        hits = select_hits(found, clue_weights(found, found[0].grounding), search)
        passages = [hit.passage for hit in hits]
        sources = tuple(Source(p.text) for p in passages)
        request = GenerateRequest("answer", question, sources, "en", ANSWER_TOKENS, "benchmark", stream=False)
        async for item in generator.options(stream=True).generate.remote(request):
            if isinstance(item, Generation):
                ids = tuple(passage.id for passage in passages)
                await retriever.evidence.remote(EvidenceRequest(index, ids, question, item.text))

    return ask


async def measure(ask: Ask, questions: list[str], clients: int) -> tuple[float, float]:
    """Questions per second, and the median seconds of one, with so many asked at a time."""
    waiting, seconds = list(reversed(questions)), []

    async def client() -> None:
        while waiting:
            question, began = waiting.pop(), time.perf_counter()
            await ask(question)
            seconds.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return len(questions) / (time.perf_counter() - began), statistics.median(seconds)


async def run(address: str, storage: str, count: int) -> tuple[list[dict[str, object]], dict[str, float]]:
    async with aiohttp.ClientSession(address, raise_for_status=True) as http:
        await memorize_town(http)
        ways: dict[str, Ask] = {
            "engines alone": engines_alone(storage),
            "Router and Ingress": lambda question: over_http(http, question),
        }
        rows, rate, median = [], {}, {}
        for clients in CLIENTS:
            for way, ask in ways.items():
                say(f"{way}, {clients} at a time")
                number = max(16, count // 8) if clients == 1 else count
                await measure(ask, [f"Warm-up {i}: who sailed?" for i in range(4 * clients)], clients)
                questions = [
                    f"{way} {clients}: who took office or sailed in the year {1201 + i}?" for i in range(number)
                ]
                rate[way, clients], median[way, clients] = await measure(ask, questions, clients)
                rows.append(
                    {"way": way, "clients": clients, "questions": number, "questions/s": rate[way, clients],
                     "median ms": median[way, clients] * 1000}
                )  # fmt: skip
    ratios = {
        f"overhead_{clients}": median["Router and Ingress", clients] / median["engines alone", clients] - 1
        for clients in CLIENTS
    }
    ratios["questions_per_s_16"] = rate["Router and Ingress", 16]
    ratios["over_first_sketch_16"] = rate["Router and Ingress", 16] / SKETCH_QUESTIONS_PER_S
    return rows, ratios


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--questions", type=int, default=160, help="asked by 16 clients in each way")
    arguments = parser.parse_args()
    say("starting a server")
    rows, ratios = measure_on_server(
        load_profile("embedded"), lambda address, storage: run(address, storage, arguments.questions)
    )
    report("pipeline", rows, ratios, arguments.json)


if __name__ == "__main__":
    main()
