"""OpenAI's routes over memories: a memory is a model, the last user message the question.

`memorag/<memory>` names one memory, `memorag/<a>+<b>` several, `memorag/tag:<tag>` all with a tag. Shapes are those of
https://platform.openai.com/docs/api-reference/chat; what they have no place for is in the field `memorag`.
"""

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import ServerSentEvent

from serving import api
from serving.documents.receive import validate
from serving.errors import ProblemError
from serving.http.event_stream import stream_events, write_data
from serving.http.openai_errors import error_body
from serving.http.problems import STATUSES
from serving.http.state import Tenant, questions_of, router_of

PREFIX = "memorag/"
_TAG = "tag:"
# Parameters whose other values are not supported: these say what is done anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_UNSUPPORTED = {"param": "messages", "code": "unsupported_value"}


class ContentPart(BaseModel):
    """A piece of a message: of the type `text`, or it is refused by name."""

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    """A message of a conversation; of those that a client sends back, more than this is not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None

    @property
    def text(self) -> str:
        """Raises `ProblemError` 400 where there is more than text."""
        if not isinstance(self.content, list):
            return self.content or ""
        for part in self.content:
            if part.type not in _TEXT_PARTS:
                raise ProblemError(400, f"content of type {part.type!r} is not supported; send text", _UNSUPPORTED)
        return "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion. `task`, `short`, `language` and `annotations` are ours: clients send them as `extra_body`."""

    model_config = ConfigDict(extra="allow")  # what is not known is refused by name

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = Field(None, description="taken, and not used: keys say whose a request is")
    metadata: dict[str, str] | None = Field(None, description="taken, and not used")
    task: api.Task | None = None
    short: bool = False
    language: api.Language | None = None
    annotations: bool = Field(False, description="whether citations also come as OpenAI's `url_citation`s")


class ModelOut(BaseModel):
    """A memory that is ready, as a model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class ErrorDetail(BaseModel):
    """Whose fault it was, and which parameter's."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorOut(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ErrorOut} for status, text in STATUSES.items()
}


@dataclass(frozen=True, slots=True)
class Named:
    """The memories that a model stands for."""

    memories: tuple[str, ...]
    tag: str | None

    @staticmethod
    def parse(model: str) -> "Named":
        """Raises `ProblemError` 404 for what names no memory."""
        name = model.removeprefix(PREFIX)
        if name == model or not name:
            raise ProblemError(
                404,
                f"the model {model!r} does not exist: memories are named {PREFIX}<memory>, {PREFIX}<a>+<b> or "
                f"{PREFIX}{_TAG}<tag>; GET /v1/models lists them",
                {"param": "model", "code": "model_not_found"},
            )
        if name.startswith(_TAG):
            return Named((), name.removeprefix(_TAG))
        return Named(tuple(name.split("+")), None)


def add_openai_routes(app: FastAPI) -> None:
    """`/v1/models` and `/v1/chat/completions`."""

    @app.get("/v1/models", responses=_ERRORS)
    async def list_models(request: Request, tenant: Tenant) -> ModelList:
        """Every ready memory, as a model."""
        router, cursor, models = router_of(request), None, []
        while True:
            page: api.MemoryList = await router.list_memories.remote(tenant, cursor, 1000, None)
            models += [_model(memory) for memory in page.memories if memory.status == "ready"]
            cursor = page.next_cursor
            if cursor is None:
                return ModelList(data=models)

    @app.get("/v1/models/{model:path}", responses=_ERRORS)
    async def get_model(request: Request, tenant: Tenant, model: str) -> ModelOut:
        """One memory as a model."""
        named = Named.parse(model)
        if named.tag is not None or len(named.memories) > 1:
            return ModelOut(id=model, created=0, owned_by="memorag")
        return _model(await router_of(request).get.remote(tenant, named.memories[0]))

    @app.post("/v1/chat/completions", responses={**_ERRORS, 200: {"content": {"text/event-stream": {}}}})
    async def chat_completions(request: Request, tenant: Tenant, chat: ChatRequest) -> Any:
        """An answer to the last user message, with the conversation before it; streamed if `stream`."""
        named, question = Named.parse(chat.model), question_of(chat)
        completion = Completion(chat, str(request.base_url))
        router, questions = router_of(request), questions_of(request)
        if not chat.stream:
            async with questions:
                answer = await router.answer.remote(tenant, named.memories, named.tag, question)
            return JSONResponse(completion.whole(answer))
        events = router.options(stream=True).ask.remote(tenant, named.memories, named.tag, question)
        return await stream_events(events, questions, completion)


def question_of(chat: ChatRequest) -> api.Question:
    """What the last user message asks. Raises `ProblemError` 400, naming what is not supported, or as `validate`."""
    for name, value in (chat.model_extra or {}).items():
        if value is not None and value not in _NEUTRAL.get(name, ()):
            told = (
                f"{name}: {json.dumps(value)[:80]} is not supported" if name in _NEUTRAL else f"{name} is not supported"
            )
            raise ProblemError(400, f"{told}; leave it out", {"param": name, "code": "unsupported_parameter"})
    said = [message for message in chat.messages if message.role in ("user", "assistant")]
    if not said or said[-1].role != "user":
        raise ProblemError(400, "the last message must be the user's: it is the question", {"param": "messages"})
    instructions = [message.text for message in chat.messages if message.role in ("system", "developer")]
    stop = [chat.stop] if isinstance(chat.stop, str) else chat.stop or []
    values = {
        "question": said[-1].text,
        "messages": [{"role": message.role, "content": message.text} for message in said[:-1]],
        "system": "\n\n".join(instructions) or None,
        "task": chat.task or "memorag",
        "max_tokens": chat.max_completion_tokens or chat.max_tokens,
        "temperature": chat.temperature or 0.0,
        "top_p": 1.0 if chat.top_p is None else chat.top_p,
        "seed": chat.seed,
        "stop": stop,
        "short": chat.short,
        "language": chat.language,
        "stream": bool(chat.stream),
    }
    question: api.Question = validate(api.Question, values)
    return question


class Completion:
    """One chat completion: what its id, model and options make of an answer."""

    def __init__(self, chat: ChatRequest, base_url: str) -> None:
        self._chat = chat
        self._base_url = base_url.rstrip("/")
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._speaks = False  # whether the stream has said who does

    def whole(self, answer: api.Answer) -> dict[str, Any]:
        """The completion in one piece."""
        message = {"role": "assistant", "content": answer.answer, "refusal": None, **self._beside(answer)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return self._frame("chat.completion", [choice]) | {"usage": _usage(answer)}

    def lines(self, event: api.Event) -> Iterator[ServerSentEvent]:
        """The chunks of an event: pieces of the answer; at its end all that it has beside its text."""
        if event.name == "token":
            yield self._chunk([self._piece(event.data["text"])])
        elif event.name == "done":
            answer = api.Answer.model_validate(event.data)
            if not self._speaks:
                yield self._chunk([self._piece("")])
            yield self._chunk([_choice(self._beside(answer), answer.finish_reason)])
            if self._chat.stream_options and self._chat.stream_options.include_usage:
                yield self._chunk([], usage=_usage(answer))
            yield ServerSentEvent(data="[DONE]")

    def failure(self, problem: ProblemError) -> ServerSentEvent:
        """What a stream that has begun ends with."""
        return ServerSentEvent(data=write_data(error_body(problem.status, problem.body())))

    def _piece(self, text: str) -> dict[str, Any]:
        delta = {"content": text} if self._speaks else {"role": "assistant", "content": text}
        self._speaks = True
        return _choice(delta, None)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> ServerSentEvent:
        return ServerSentEvent(data=write_data(self._frame("chat.completion.chunk", choices) | more))

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._chat.model,
            "choices": choices,
        }

    def _beside(self, answer: api.Answer) -> dict[str, Any]:
        found = {"memorag": answer.model_dump(mode="json", exclude={"answer", "finish_reason"})}
        return found | ({"annotations": self._annotations(answer)} if self._chat.annotations else {})

    def _annotations(self, answer: api.Answer) -> list[dict[str, Any]]:
        """Each `[n]` of the answer; its URL opens the document, RFC 5147 says at which characters."""
        annotations = []
        for cited in answer.citations:
            path = f"/v1/memories/{cited.memory}/documents/{cited.document}#char={cited.start},{cited.end}"
            mark = f"[{cited.n}]"
            start = answer.answer.find(mark)
            while start >= 0:
                place = {"start_index": start, "end_index": start + len(mark)}
                where = {"title": cited.document, "url": self._base_url + path}
                annotations.append({"type": "url_citation", "url_citation": place | where})
                start = answer.answer.find(mark, start + 1)
        return annotations


def _choice(delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def _usage(answer: api.Answer) -> dict[str, Any]:
    """Of all models that worked on it; memory slots are prompt tokens that were cached."""
    used = answer.usage
    prompt = used.prompt_tokens + used.recall_prompt_tokens
    completion = used.completion_tokens + used.recall_completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _model(memory: api.MemoryOut) -> ModelOut:
    if memory.status != "ready":
        raise ProblemError(
            404,
            f"the memory {memory.id!r} is {memory.status}; it is a model once it is ready",
            {"param": "model", "code": "model_not_found"},
        )
    return ModelOut(
        id=PREFIX + memory.id, created=int(datetime.fromisoformat(memory.created).timestamp()), owned_by="memorag"
    )
