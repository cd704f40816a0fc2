"""Random kills under load, and what came of them: `make soak`, and in its short form `test_chaos.py`.

16 clients ask, change and make memories while one process after another is killed with SIGKILL. Every answer is checked
against the texts: a passage that is not exactly what that version's document says, an answer from another memory or
from a version that was replaced before the question was asked, is wrong; so is a failure that a client is not told to
try again, and one that trying again does not mend. Every change that was acknowledged is looked for at once and at the
end: what is not there is lost.

python -m tests.support.chaos --storage FOLDER [--minutes 20] [--seed 0] [--json FILE]
"""

import argparse
import asyncio
import json
import random
import sys
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.processes import PARTS, kill_part, kill_server, start_again

CLIENTS = 16
DEADLINE_S = 600.0  # for one request, retries included, and for one recovery: both from when the server runs
_RETRYABLE = (429, 503)
_REFUSED = (404, 409, 412)  # the caller says what that means: an earlier try of the same request may have been done
_MEMORIES = 12  # at most
_WORDS = (
    "harbour", "lantern", "orchard", "miller", "bridge", "winter", "ledger", "granary", "anchor", "chapel", "meadow",
)  # fmt: skip

Texts = dict[str, str]  # of a memory's documents


@dataclass
class Expected:
    """What is known of one memory."""

    versions: dict[str, Texts] = field(default_factory=dict)  # those that were seen, oldest first
    pending: Texts | None = None  # what a change under way makes of it, if it is done
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held by the client that changes it

    @property
    def newest(self) -> str:
        return next(reversed(self.versions))

    @property
    def texts(self) -> Texts:
        return self.versions[self.newest]


@dataclass
class Kill:
    """One of them."""

    part: str
    minute: float  # since the beginning
    recovery_s: float  # until a memory could be made and asked, with clues
    failures: int  # requests that were answered with an error, or not at all, until then


@dataclass
class Findings:
    """What happened."""

    requests: int = 0
    answers: int = 0
    changes: int = 0  # that were acknowledged and are there
    slowest_s: float = 0.0  # of a request, retries included
    failures: Counter[str] = field(default_factory=Counter)
    degraded: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        parts = defaultdict(list)
        for kill in self.kills:
            parts[kill.part].append(kill)
        return {
            "requests": self.requests,
            "answers checked": self.answers,
            "changes checked": self.changes,
            "slowest request with its retries (s)": round(self.slowest_s, 1),
            "failures by kind, all retried": dict(self.failures.most_common()),
            "degraded answers": dict(self.degraded),
            "wrong answers": len(self.wrong),
            "memories lost": len(self.lost),
            "kills": len(self.kills),
            "by part": {
                part: {
                    "kills": len(kills),
                    "recovery s, median": round(sorted(kill.recovery_s for kill in kills)[len(kills) // 2], 1),
                    "recovery s, longest": round(max(kill.recovery_s for kill in kills), 1),
                    "failed requests a kill": round(sum(kill.failures for kill in kills) / len(kills), 1),
                }
                for part, kills in sorted(parts.items())
            },
            "what was wrong": self.wrong[:20],
            "what was lost": self.lost[:20],
        }


class Chaos:
    """Load on one server, and kills of its processes."""

    def __init__(self, storage: Path, seed: int) -> None:
        self.storage = storage
        self.random = random.Random(seed)
        self.found = Findings()
        self.memories: dict[str, Expected] = {}  # those that were made
        self._run = f"chaos-{uuid.uuid4().hex[:6]}"  # begins their ids
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._up = asyncio.Event()  # not set while the whole server is being started again, however long that takes
        self._up.set()
        self._made = 0
        self._http: httpx.AsyncClient

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.storage / "server.json").read_text())

    async def run(self, parts: list[str], pause_s: float, until: float | None = None) -> Findings:
        """Kills each of `parts` once, or random ones until that time; asks all the while, and checks at the end."""
        self._http = httpx.AsyncClient(base_url=self.state["address"], timeout=60)
        async with self._http:
            for _ in range(3):
                await self._create()
            clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
            queue = list(parts)
            whole = True
            while whole and (queue if until is None else time.time() < until):
                failed, _ = await asyncio.wait(clients, timeout=pause_s, return_when=asyncio.FIRST_EXCEPTION)
                if failed:  # the harness is wrong; `gather` raises it
                    break
                whole = await self._kill(queue.pop(0) if until is None else self.random.choice(parts))
            self._stop.set()
            await asyncio.gather(*clients)
            await self._look_for_everything()
        return self.found

    # -- load ----------------------------------------------------------------------------------------------

    async def _client(self, number: int) -> None:
        chance = random.Random(f"{self.random.random()} {number}")
        while not self._stop.is_set():
            act = chance.random()
            memory = chance.choice(sorted(self.memories))
            if act < 0.03 and self._made < _MEMORIES:
                await self._create()
            elif act < 0.10 and not self.memories[memory].lock.locked():
                await self._change(memory, chance)
            else:
                await self._ask(memory, chance)

    async def _create(self) -> None:
        self._made += 1
        memory = f"{self._run}-{self._made}"
        expected = Expected(pending={"first": (words := text(f"{memory} first"))})
        documents = [{"id": "first", "text": words}]
        response = await self._request("POST", "/v1/memories", json={"id": memory, "documents": documents})
        # 409: an earlier try was done, though its answer was lost.
        if response is not None and await self._settled(memory, expected, acknowledged=True):
            self.memories[memory] = expected

    async def _change(self, memory: str, chance: random.Random) -> None:
        expected = self.memories[memory]
        async with expected.lock:
            current = expected.texts
            if len(current) > 3 or (len(current) > 1 and chance.random() < 0.3):
                document = chance.choice([name for name in sorted(current) if name != "first"])
                expected.pending = {name: text for name, text in current.items() if name != document}
                response = await self._request("DELETE", f"/v1/memories/{memory}/documents/{document}")
            else:
                document = chance.choice([f"d{chance.randrange(1000)}", "first"])
                words = text(f"{memory} {document} {chance.random()}")
                expected.pending = current | {document: words}
                path = f"/v1/memories/{memory}/documents/{document}"
                response = await self._request("PUT", path, json={"text": words})
            # Also where it failed or was refused: an earlier try may have been done, and 412 be its doing.
            done = response is not None and response.status_code < 400
            await self._settled(memory, expected, acknowledged=done)

    async def _settled(self, memory: str, expected: Expected, *, acknowledged: bool) -> bool:
        """Waits until no job is under way, and notes what came of it; whether that is as it has to be."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            response = await self._request("GET", f"/v1/memories/{memory}")
            if response is None:
                return False
            info = response.json()
            if response.status_code != 200 or info["job"] is None:
                return self._noted(memory, expected, info, acknowledged)
            await asyncio.sleep(0.3)
        self.found.lost.append(f"{memory}: its job did not end in {DEADLINE_S:.0f} s")
        return False

    def _noted(self, memory: str, expected: Expected, info: dict[str, Any], acknowledged: bool) -> bool:
        if info["status"] != "ready":
            self.found.lost.append(f"{memory}: {info['status']}, {info.get('error', info)}")
            return False
        if info["version"] in expected.versions:
            if acknowledged:
                self.found.lost.append(f"{memory}: an acknowledged change is not in {info['version']}: {info['error']}")
            return not acknowledged
        there = {document["id"]: document["characters"] for document in info["documents"]}
        wanted = {name: len(text) for name, text in (expected.pending or {}).items()}
        if there != wanted:
            self.found.lost.append(f"{memory} {info['version']}: has {there}, not {wanted}")
            return False
        expected.versions[info["version"]] = dict(expected.pending or {})
        self.found.changes += 1
        return True

    async def _ask(self, memory: str, chance: random.Random) -> None:
        oldest = len(self.memories[memory].versions) - 1  # no version before this one may answer
        task = chance.choice(["memorag", "memorag", "rag", "memory"])
        question = f"What of the {chance.choice(_WORDS)} and the {chance.choice(_WORDS)} at {memory}?"
        body = {"question": question, "task": task, "max_tokens": 16}
        response = await self._request("POST", f"/v1/memories/{memory}/answer", json=body)
        if response is None:
            return
        if response.status_code != 200:  # it is ready, and has been since before the question
            self.found.lost.append(f"{memory}: asked, and it answered {response.status_code} {response.text[:200]}")
            return
        self._check(memory, oldest, response.json())

    def _check(self, memory: str, oldest: int, answer: dict[str, Any]) -> None:
        expected, version = self.memories[memory], answer["version"]
        self.found.answers += 1
        self.found.degraded.update(note for note in answer["degraded"] if note != "embedded-model")
        if answer["memory"] != memory:
            self.found.wrong.append(f"asked {memory}, answered {answer['memory']}")
        if version in expected.versions and [*expected.versions].index(version) < oldest:
            self.found.wrong.append(f"{memory}: {version} answered though {[*expected.versions][oldest]} was there")
        # A version that no client has seen yet is the one that the change under way makes.
        texts = expected.versions.get(version, expected.pending or {})
        for kind in ("passages", "evidence"):
            for part in answer[kind]:
                exact = texts.get(part["document"], "")[part["start"] : part["end"]] == part["text"]
                if part["memory"] != memory or not exact:
                    self.found.wrong.append(f"{memory} {version}: {kind} {part}")

    async def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response | None:
        """The response, after as many retries as the server asks for; none where that does not help, which is wrong."""
        began = time.monotonic()
        while time.monotonic() < began + DEADLINE_S:
            self.found.requests += 1
            pause = 0.5
            try:
                response = await self._http.request(method, path, **arguments)
            except httpx.TransportError as error:
                self.found.failures[f"{method} {type(error).__name__}"] += 1
            else:
                if response.status_code < 400 or response.status_code in _REFUSED:
                    self.found.slowest_s = max(self.found.slowest_s, time.monotonic() - began)
                    return response
                self.found.failures[f"{method} {response.status_code}"] += 1
                if response.status_code not in _RETRYABLE or "retry-after" not in response.headers:
                    self.found.wrong.append(f"{method} {path}: {response.status_code} {response.text[:300]}")
                    return None
                pause = min(1.0, float(response.headers["retry-after"]))
            if not self._up.is_set():
                await self._up.wait()
                began = time.monotonic()
            await asyncio.sleep(pause)
        self.found.wrong.append(f"{method} {path}: no retry helped in {DEADLINE_S:.0f} s")
        return None

    # -- kills ---------------------------------------------------------------------------------------------

    async def _kill(self, part: str) -> bool:
        """Kills it, waits for its recovery, and says whether that came."""
        failed = self.found.failures.total()
        state = self.state
        if part == "server":
            self._up.clear()
            began = time.monotonic()
            await asyncio.to_thread(kill_server, state)
            await asyncio.to_thread(start_again, state, self.storage)
            self._up.set()
        else:
            began = await asyncio.to_thread(kill_part, state, part)
        whole = await self._whole_again(part)
        found = self.found
        kill = Kill(part, (began - self._began) / 60, time.monotonic() - began, found.failures.total() - failed)
        found.kills.append(kill)
        sys.stderr.write(
            f"{kill.minute:5.1f} min: {part} killed, {'' if whole else 'NOT '}whole again after {kill.recovery_s:.1f} "
            f"s, {kill.failures} failed requests; so far {found.answers} answers, {len(found.wrong)} wrong, "
            f"{len(found.lost)} lost\n"
        )
        return whole

    async def _whole_again(self, part: str) -> bool:
        """Until a memory can be made, and a question is answered with its clues: what every part is needed for."""
        probe = f"{self._run}-probe-{len(self.found.kills)}"
        documents = [{"text": text(probe)}]
        steps = [
            ("POST", "/v1/memories", {"json": {"id": probe, "documents": documents}}, (202, 409)),
            ("POST", f"/v1/memories/{probe}/answer", {"json": {"question": "Who was there?", "max_tokens": 4}}, (200,)),
            ("DELETE", f"/v1/memories/{probe}", {}, (204, 404)),
        ]
        deadline = time.monotonic() + DEADLINE_S
        answered = "nothing"
        while steps and time.monotonic() < deadline:
            method, path, arguments, done = steps[0]
            try:
                response = await self._http.request(method, path, **arguments)
            except httpx.TransportError as error:
                answered = repr(error)
            else:
                answered = f"{response.status_code} {response.text[:300]}"
                if response.status_code in done and not _without_clues(response):
                    steps.pop(0)
                    continue
            await asyncio.sleep(0.1)
        if steps:
            method, path = steps[0][:2]
            self.found.wrong.append(f"not whole {DEADLINE_S:.0f} s after {part}: {method} {path} answers {answered}")
        return not steps

    async def _look_for_everything(self) -> None:
        """Every memory is as its last change left it, text by text, and answers; then it is deleted."""
        for memory, expected in self.memories.items():
            if not await self._settled(memory, expected, acknowledged=False):
                continue
            for document, words in expected.texts.items():
                source = await self._request("GET", f"/v1/memories/{memory}/documents/{document}")
                if source is None or source.text != words:
                    self.found.lost.append(f"{memory}/{document}: another text")
            await self._ask(memory, self.random)
            await self._request("DELETE", f"/v1/memories/{memory}")


def text(name: str, sentences: int = 40) -> str:
    """Sentences that stand in no other text, nor twice in this one."""
    chance = random.Random(name)
    return " ".join(
        f"In {name}, the {chance.choice(_WORDS)} number {number}{chance.randrange(10**4):04} stood by the "
        f"{chance.choice(_WORDS)} of the {chance.choice(_WORDS)}."
        for number in range(sentences)
    )


def _without_clues(response: httpx.Response) -> bool:
    return response.status_code == 200 and "recall" in response.json()["degraded"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True, help="of a running server that asks for no keys")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between a recovery and the next kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write what came of it there")
    arguments = parser.parse_args()
    chaos = Chaos(arguments.storage, arguments.seed)
    try:
        asyncio.run(chaos.run([*PARTS, "server"], arguments.pause, time.time() + 60 * arguments.minutes))
    finally:  # also where the harness itself fails, or somebody ends it
        found = json.dumps(chaos.found.summary(), indent=1)
        print(found)
        if arguments.json:
            arguments.json.write_text(found + "\n")
    if chaos.found.wrong or chaos.found.lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
