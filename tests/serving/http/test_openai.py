"""OpenAI's own client against the routes, with a Router that answers at once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request

from memory_worker.errors import MemoryNotFound
from serving import api
from serving.errors import ProblemError
from serving.http.admission import InFlight
from serving.http.openai import add_openai_routes
from serving.http.openai_errors import OpenAIErrors
from serving.http.problems import add_error_handlers

CITED = {"memory": "book", "document": "a.txt", "start": 10, "end": 30}
ANSWER = api.Answer(
    memory="book",
    version="v1",
    memories=[api.MemoryVersion(id="book", version="v1")],
    task="memorag",
    question="Who lit the lamp?",
    answer="The keeper [1].",
    finish_reason="stop",
    citations=[api.CitationOut(n=1, **CITED)],
    evidence=[],
    clues=[api.ClueOut(kind="span", text="the keeper lit it")],
    passages=[api.PassageOut(**CITED, text="The keeper lit it.", score=1.0)],
    degraded=[],
    usage=api.Usage(recall_prompt_tokens=5, recall_completion_tokens=2, prompt_tokens=20, completion_tokens=4),
    timings_ms=api.Timings(),
)


def memory(id: str, status: api.Status = "ready") -> api.MemoryOut:
    sizes = dict.fromkeys(("ratio", "slots", "tokens", "passages", "bytes"), 1)
    return api.MemoryOut(
        id=id, status=status, version="v1", kind="full", documents=[], created="2026-01-02T03:04:05+00:00", **sizes
    )


class Router:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[str, ...], str | None, api.Question]] = []
        self.closed = 0
        self.breaks = False

    def options(self, **_: object) -> "Router":
        return self

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self, f"_{name}"))

    async def _list_memories(self, tenant: str, cursor: str | None, limit: int, tag: str | None) -> api.MemoryList:
        pages = {None: ([memory("a"), memory("new", "memorizing")], "b"), "b": ([memory("book")], None)}
        found, following = pages[cursor]
        return api.MemoryList(memories=found, next_cursor=following)

    async def _get(self, tenant: str, name: str) -> api.MemoryOut:
        if name == "none":
            raise MemoryNotFound(name)
        return memory(name, "memorizing" if name == "new" else "ready")

    async def _answer(self, tenant: str, memories: tuple[str, ...], tag: str | None, question: api.Question) -> Any:
        self.asked.append((memories, tag, question))
        if "none" in memories:
            raise MemoryNotFound("none")
        return ANSWER

    def _ask(self, tenant: str, memories: tuple[str, ...], tag: str | None, question: api.Question) -> "Events":
        self.asked.append((memories, tag, question))
        return Events(self)


class Events:
    def __init__(self, router: Router) -> None:
        self._router = router

    async def __aiter__(self) -> AsyncIterator[api.Event]:
        yield api.Event(name="clue", data={"kind": "span", "text": "the keeper lit it"})
        for text in ("The keeper", " [1]."):
            yield api.Event(name="token", data={"text": text})
        if self._router.breaks:
            raise ProblemError(503, "the engine died")
        yield api.Event(name="done", data=ANSWER.model_dump())

    def cancel(self) -> None:
        self._router.closed += 1


@pytest.fixture
def router() -> Router:
    return Router()


@pytest.fixture
def app(router: Router) -> FastAPI:
    made = FastAPI()
    made.state.router, made.state.questions = router, InFlight(4)

    async def known(request: Request, call_next: Any) -> Any:
        request.state.tenant = "default"
        return await call_next(request)

    made.middleware("http")(known)
    made.add_middleware(OpenAIErrors)
    add_error_handlers(made)
    add_openai_routes(made)
    return made


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False))
    async with openai.AsyncOpenAI(base_url="http://here/v1", api_key="k", http_client=http, max_retries=0) as client:
        yield client


ASK: Any = [{"role": "user", "content": "Who lit the lamp?"}]


async def test_ready_memories_are_models(app: FastAPI) -> None:
    async with client_of(app) as client:
        assert [model.id async for model in client.models.list()] == ["memorag/a", "memorag/book"]
        assert (await client.models.retrieve("memorag/book")).created == 1767323045
        assert (await client.models.retrieve("memorag/a+book")).id == "memorag/a+book"
        for name in ("memorag/none", "memorag/new", "gpt-5"):
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve(name)


async def test_a_completion_is_the_answer_with_all_that_belongs_to_it(app: FastAPI, router: Router) -> None:
    async with client_of(app) as client:
        made = await client.chat.completions.create(model="memorag/book", messages=ASK)
        message = made.choices[0].message
        assert (message.role, message.content, made.choices[0].finish_reason) == ("assistant", ANSWER.answer, "stop")
        assert made.usage and (made.usage.prompt_tokens, made.usage.completion_tokens) == (25, 6)
        beside = message.model_extra["memorag"]
        assert beside["citations"] == [CITED | {"n": 1}] and beside["clues"][0]["text"] == "the keeper lit it"
        assert message.annotations is None
        made = await client.chat.completions.create(
            model="memorag/book", messages=ASK, extra_body={"annotations": True, "task": "rag"}
        )
        (cited,) = made.choices[0].message.annotations or []
        place = cited.url_citation
        assert ANSWER.answer[place.start_index : place.end_index] == "[1]"
        assert place.url == "http://here/v1/memories/book/documents/a.txt#char=10,30"
    assert [asked[2].task for asked in router.asked] == ["memorag", "rag"]


async def test_what_a_client_sets_arrives(app: FastAPI, router: Router) -> None:
    messages: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Who kept"}, {"type": "text", "text": " the gate?"}]},
        {"role": "assistant", "content": "Anna.", "refusal": None},
        {"role": "user", "content": "When did she leave?"},
    ]
    async with client_of(app) as client:
        await client.chat.completions.create(
            model="memorag/a+book",
            messages=messages,
            temperature=0.5,
            top_p=0.9,
            seed=7,
            stop="\n",
            max_completion_tokens=9,
            n=1,
            user="someone",
            presence_penalty=0,
            tools=[],
            response_format={"type": "text"},
        )
        await client.chat.completions.create(model="memorag/tag:law", messages=ASK, stop=["a", "b"], max_tokens=3)
    (memories, tag, question), (none, law, other) = router.asked
    assert (memories, tag, none, law) == (("a", "book"), None, (), "law")
    assert question.question == "When did she leave?" and question.system == "Be kind."
    assert [(turn.role, turn.content) for turn in question.messages] == [
        ("user", "Who kept the gate?"),
        ("assistant", "Anna."),
    ]
    settings = question.temperature, question.top_p, question.seed, question.stop, question.max_tokens
    assert settings == (0.5, 0.9, 7, ["\n"], 9)
    assert (other.stop, other.max_tokens, other.temperature) == (["a", "b"], 3, 0.0)


async def test_a_stream_is_chunks_whose_last_has_all_that_belongs_to_it(app: FastAPI, router: Router) -> None:
    async with client_of(app) as client:
        stream = await client.chat.completions.create(
            model="memorag/book", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    *pieces, end, usage = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == ANSWER.answer
    assert [piece.choices[0].delta.role for piece in pieces] == ["assistant", None]
    assert end.choices[0].finish_reason == "stop"
    assert end.choices[0].delta.model_extra["memorag"]["passages"][0]["text"] == "The keeper lit it."
    assert not usage.choices and usage.usage and usage.usage.total_tokens == 31
    assert len({chunk.id for chunk in chunks}) == 1 and router.closed == 1


async def test_a_client_that_stops_ends_the_question(app: FastAPI, router: Router) -> None:
    async with client_of(app) as client:
        stream = await client.chat.completions.create(model="memorag/book", messages=ASK, stream=True)
        async for _ in stream:
            break
        await stream.close()
    assert router.closed == 1 and app.state.questions.count == 0


async def test_failures_have_openais_shape(app: FastAPI, router: Router) -> None:
    async with client_of(app) as client:

        async def failure(**arguments: Any) -> openai.APIStatusError:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(**{"model": "memorag/book", "messages": ASK} | arguments)
            assert isinstance(caught.value.body, dict)
            assert set(caught.value.body) == {"message", "type", "param", "code"}
            return caught.value

        missing = await failure(model="memorag/none")
        assert isinstance(missing, openai.NotFoundError) and missing.type == "invalid_request_error"
        unknown = await failure(model="gpt-5")
        assert (unknown.status_code, unknown.code, unknown.param) == (404, "model_not_found", "model")
        two = await failure(n=2)
        assert (two.status_code, two.param) == (400, "n") and "n: 2 is not supported" in two.message
        tools = await failure(tools=[{"type": "function", "function": {"name": "f"}}])
        assert (tools.status_code, tools.param) == (400, "tools")
        odd = await failure(extra_body={"best_of": 3})
        assert (odd.status_code, odd.param) == (400, "best_of")
        assert (await failure(temperature=3)).status_code == 400
        assert (await failure(messages=[])).status_code == 400
        empty = await failure(messages=[{"role": "user", "content": ""}])
        assert empty.status_code == 400 and "question: String should have at least 1 character;" in empty.message
        assert (await failure(messages=[{"role": "assistant", "content": "Hi."}])).param == "messages"
        image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
        assert "image_url" in (await failure(messages=[{"role": "user", "content": image}])).message
        router.breaks = True
        with pytest.raises(openai.APIError, match="the engine died"):
            _ = [c async for c in await client.chat.completions.create(model="memorag/book", messages=ASK, stream=True)]
