"""The Python client: `MemoRAG` speaks the HTTP of docs/http.md to a server. Needs no GPU library.

client = MemoRAG("http://127.0.0.1:8000")
book = client.memorize("book.txt", id="book")
print(book.ask("How many times is the gate opened?").text)
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload
from urllib.parse import quote

import httpx
import httpx_sse

from cluster.planning.costs import MemoryKind
from serving.client.errors import MemoRAGError, ServerUnreachable, check, problem_error
from serving.client.progress import OnProgress, show_progress

Task = Literal["memorag", "memory", "rag", "summarize", "full", "hyde", "rewrite"]
_RECONNECTS = 5
_RECONNECT_S = 0.05  # doubled with every attempt


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a streamed answer: clue, passage, token, then done."""

    name: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and all that led to it; offsets count characters of the document's text."""

    text: str
    clues: list[dict[str, Any]]  # kind, text
    passages: list[dict[str, Any]]  # document, start, end, text, score
    citations: list[dict[str, Any]]  # n, document, start, end
    evidence: list[dict[str, Any]]  # document, start, end, text, score
    timings: dict[str, float]  # milliseconds: recall, retrieve, generate, total
    degraded: list[str]
    raw: dict[str, Any] = field(repr=False)  # as the server sent it

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "Answer":
        """The answer in the server's JSON."""
        lists = {name: raw[name] for name in ("clues", "passages", "citations", "evidence", "degraded")}
        return cls(text=raw["answer"], timings=raw["timings_ms"], raw=raw, **lists)


class MemoRAG:
    """A server. `timeout` is the longest silence of it, in seconds, that is waited out."""

    def __init__(self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, *, timeout: float = 600) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout, connect=10))

    def memorize(
        self,
        *paths: str | Path,
        text: str | None = None,
        id: str | None = None,
        title: str | None = None,
        tags: Sequence[str] = (),
        kind: MemoryKind | None = None,
        ratio: int | None = None,
        progress: bool | OnProgress | None = None,
    ) -> "Memory":
        """Makes a memory of files (txt, md, html, pdf, docx) or of `text`, and waits until it is ready.

        `kind` and `ratio` are as in docs/kinds.md; the server chooses where they are left out.
        `progress`: True draws a bar, or lines off a terminal; False is silent; None draws on a terminal only; a
        function is called with every progress event.

        Raises `MemoRAGError` where the server refuses, or fails to make the memory.
        """
        if (text is None) == (not paths):
            raise ValueError("give either the paths of files or text=, and not both")
        fields = _drop_none({"id": id, "title": title, "kind": kind, "ratio": ratio})
        if text is not None:
            body = {**fields, "tags": list(tags), "documents": [{"text": text}]}
            created = self._json("POST", "/v1/memories", json=body)
        else:
            with ExitStack() as stack:
                files = [("files", (Path(p).name, stack.enter_context(Path(p).open("rb")))) for p in paths]
                data = {name: str(value) for name, value in fields.items()} | {"tags": list(tags)}
                created = self._json("POST", "/v1/memories", files=files, data=data)
        memory = Memory(self, created)
        memory.wait(progress=progress)
        return memory

    def memory(self, id: str) -> "Memory":
        """The memory of that id. Raises `MemoRAGError` with status 404 where there is none."""
        return Memory(self, self._json("GET", _path(id)))

    def memories(self, tag: str | None = None) -> Iterator["Memory"]:
        """All memories, or those with a tag, page by page."""
        cursor: str | None = None
        while True:
            page = self._json("GET", "/v1/memories", params=_drop_none({"cursor": cursor, "tag": tag}))
            yield from (Memory(self, info) for info in page["memories"])
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def ask(
        self,
        question: str,
        *,
        memories: Sequence[str] = (),
        tag: str | None = None,
        task: Task = "memorag",
        max_tokens: int | None = None,
        language: str | None = None,
    ) -> Answer:
        """The answer from several memories at once: those named, and those with the tag."""
        body = {"question": question, "memories": list(memories), "tag": tag, "task": task, "max_tokens": max_tokens}
        return Answer.of(self._json("POST", "/v1/answer", json=_drop_none(body | {"language": language})))

    def import_archive(self, path: str | Path, id: str | None = None) -> "Memory":
        """Makes a memory of a file that `Memory.export` wrote; under its own id, or `id`.

        Raises `MemoRAGError`: 409 where another model encoded it, or the id is taken; 422 where it is not whole.
        """
        with Path(path).open("rb") as file:
            headers = {"Content-Type": "application/x-tar"}
            return Memory(
                self, self._json("POST", "/v1/memories", params=_drop_none({"id": id}), content=file, headers=headers)
            )

    def usage(self) -> dict[str, Any]:
        """What the caller has, and may have."""
        return self._json("GET", "/v1/usage")

    def delete(self, id: str) -> None:
        """Deletes a memory, whatever its state."""
        self._request("DELETE", _path(id))

    def ready(self) -> dict[str, Any]:
        """What `/readyz` says. Raises where a pool does not answer."""
        return self._json("GET", "/readyz")

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> "MemoRAG":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _json(self, method: str, path: str, **arguments: Any) -> Any:
        return self._request(method, path, **arguments).json()

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        with self._reachable():
            return check(self._http.request(method, path, **arguments))

    def _stream(self, method: str, path: str, **arguments: Any) -> Iterator[Event]:
        """The events of a response; an `error` event is raised."""
        with self._reachable(), httpx_sse.connect_sse(self._http, method, path, **arguments) as source:
            if source.response.is_error:
                source.response.read()
            check(source.response)
            for event in source.iter_sse():
                data = json.loads(event.data)
                if event.event == "error":
                    raise problem_error(data)
                yield Event(event.event, data)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ServerUnreachable(f"{self.url!r} is no address of a server ({error}); use http://HOST:PORT") from None
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise ServerUnreachable(
                f"no server answers at {self.url}; start one with 'memorag up', or give the address of a running one"
            ) from None
        except httpx.TimeoutException:
            raise ServerUnreachable(f"{self.url} was silent for too long; 'memorag status' says how it is") from None
        except httpx.TransportError as error:
            raise ServerUnreachable(f"the connection to {self.url} broke off ({error}); try again") from None


class Memory:
    """One memory on a server; `info` is the server's JSON when it was last read."""

    def __init__(self, client: MemoRAG, info: dict[str, Any]) -> None:
        self._client = client
        self.info = info
        self.id: str = info["id"]

    def __repr__(self) -> str:
        return f"Memory({self.id!r}, {self.status})"

    @property
    def status(self) -> str:
        """memorizing, ready or failed, as of the last reading."""
        return str(self.info["status"])

    def refresh(self) -> "Memory":
        """Reads the memory's state again."""
        self.info = self._client._json("GET", _path(self.id))
        return self

    @property
    def busy(self) -> bool:
        """Whether it is being made or changed, as of the last reading."""
        return self.info.get("job") is not None

    @property
    def documents(self) -> "Documents":
        """Its documents, to add, replace and delete."""
        return Documents(self._client, self)

    def cancel(self) -> None:
        """Ends the job that makes or changes the memory. Raises `MemoRAGError` with status 409 where there is none."""
        self._client._request("DELETE", _path(self.id, "job"))

    def wait(self, *, progress: bool | OnProgress | None = None) -> "Memory":
        """Returns when the job that is under way is over and the memory ready; outlives broken connections.

        Raises `MemoRAGError` if that job failed, or the memory never became ready. That an earlier change failed is
        in `info["failed_change"]`, and no error: the memory is as it was before it.
        """
        followed, failed = self._job_version, False
        with show_progress(self.id, progress) as show:
            broken = 0  # connections since the last event
            while self.busy and self._job_version == followed:
                try:
                    for event in self._client._stream("GET", _path(self.id, "events")):
                        broken = 0
                        if event.name == "progress":
                            show(event.data)
                        elif event.name in ("ready", "failed"):
                            self.info = event.data
                            change = self.info.get("failed_change") or {}
                            failed = event.name == "failed" and change.get("version", followed) == followed
                except ServerUnreachable:
                    if broken == _RECONNECTS:
                        raise
                else:
                    self.refresh()
                if self.busy and self._job_version == followed:
                    broken = min(broken + 1, _RECONNECTS)
                    time.sleep(_RECONNECT_S * 2**broken)
        change = self.info.get("failed_change") or {}
        if self.status == "failed":
            raise MemoRAGError(f"memory {self.id!r} failed: {self.info['error']}", title="Memorizing failed")
        if failed or (followed and change.get("version") == followed):
            reason = change.get("error", "the server's log says more")
            raise MemoRAGError(f"changing memory {self.id!r} failed: {reason}", title="The change failed")
        return self

    @property
    def _job_version(self) -> str | None:
        job: dict[str, Any] | None = self.info.get("job")
        return job.get("version") if job else None

    @overload
    def ask(
        self, question: str, task: Task = ..., *, max_tokens: int | None = ..., language: str | None = ...,
        short: bool = ..., stream: Literal[False] = ...,
    ) -> Answer: ...  # fmt: skip
    @overload
    def ask(
        self, question: str, task: Task = ..., *, max_tokens: int | None = ..., language: str | None = ...,
        short: bool = ..., stream: Literal[True],
    ) -> Iterator[Event]: ...  # fmt: skip
    def ask(
        self,
        question: str,
        task: Task = "memorag",
        *,
        max_tokens: int | None = None,
        language: str | None = None,
        short: bool = False,
        stream: bool = False,
    ) -> Answer | Iterator[Event]:
        """The answer; `short`, a phrase without citations; with `stream`, its events, of which `done` holds all."""
        body = {"question": question, "task": task, "max_tokens": max_tokens, "language": language}
        return self._answer("answer", body | ({"short": True} if short else {}), stream)

    @overload
    def summarize(
        self, *, max_tokens: int | None = ..., language: str | None = ..., stream: Literal[False] = ...
    ) -> Answer: ...
    @overload
    def summarize(
        self, *, max_tokens: int | None = ..., language: str | None = ..., stream: Literal[True]
    ) -> Iterator[Event]: ...
    def summarize(
        self, *, max_tokens: int | None = None, language: str | None = None, stream: bool = False
    ) -> Answer | Iterator[Event]:
        """A summary of the whole memory, as `ask` gives answers."""
        return self._answer("summary", {"max_tokens": max_tokens, "language": language}, stream)

    def clues(self, question: str, *, language: str | None = None) -> list[dict[str, Any]]:
        """Only the clues that the memory gives for a question."""
        return self._stage("clues", {"question": question, "language": language})

    def passages(self, question: str) -> list[dict[str, Any]]:
        """Only the passages that match a text."""
        return self._stage("passages", {"question": question})

    def source(self, document: str) -> str:
        """The text of a document: what all offsets count characters of."""
        return self._client._request("GET", _path(self.id, "documents", document)).content.decode("utf-8")

    def export(self, path: str | Path) -> None:
        """Writes the whole memory, checksummed, to one file. Nothing is left of it where that fails."""
        target = Path(path)
        partial = target.with_name(f"{target.name}.part")
        with self._client._reachable(), self._client._http.stream("GET", _path(self.id, "archive")) as response:
            if response.is_error:
                response.read()
            check(response)
            try:
                with partial.open("wb") as file:
                    for piece in response.iter_bytes():
                        file.write(piece)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        partial.replace(target)

    def delete(self) -> None:
        """Deletes this memory."""
        self._client.delete(self.id)

    def _stage(self, stage: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._client._json("POST", _path(self.id, stage), json=_drop_none(body))[stage]
        return found

    def _answer(self, route: str, body: dict[str, Any], stream: bool) -> Answer | Iterator[Event]:
        path = _path(self.id, route)
        if stream:
            return self._client._stream("POST", path, json=_drop_none(body) | {"stream": True})
        return Answer.of(self._client._json("POST", path, json=_drop_none(body)))


class Documents:
    """The documents of one memory. A change makes a new version; `if_match` asks that the present one be that."""

    def __init__(self, client: MemoRAG, memory: Memory) -> None:
        self._client = client
        self._memory = memory

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._memory.info["documents"])

    def put(
        self,
        id: str,
        *,
        text: str | None = None,
        path: str | Path | None = None,
        if_match: str | None = None,
        progress: bool | OnProgress | None = None,
    ) -> Memory:
        """Adds a document of `text` or of the file at `path`, or replaces the one of that id; waits until it is there.

        Raises `MemoRAGError`: 412 if the memory is being changed already, or is not at version `if_match`.
        """
        if (text is None) == (path is None):
            raise ValueError("give either text= or path=, and not both")
        where, headers = _path(self._memory.id, "documents", id), _make_if_match(if_match)
        if path is None:
            info = self._client._json("PUT", where, json={"text": text}, headers=headers)
        else:
            with Path(path).open("rb") as file:
                info = self._client._json("PUT", where, files={"file": (Path(path).name, file)}, headers=headers)
        self._memory.info = info
        return self._memory.wait(progress=progress)

    def delete(self, id: str, *, if_match: str | None = None) -> Memory:
        """Deletes a document; no question sees it any more. Raises as `put`."""
        where = _path(self._memory.id, "documents", id)
        self._memory.info = self._client._json("DELETE", where, headers=_make_if_match(if_match))
        return self._memory


def _make_if_match(version: str | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}


def _path(*parts: str) -> str:
    return "/v1/memories/" + "/".join(quote(part, safe="") for part in parts)


def _drop_none(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}
