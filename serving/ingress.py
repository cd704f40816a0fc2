"""The HTTP ingress: FastAPI over the Router. Parses and refuses requests, streams events, shows problems."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from serving import api
from serving.body_limit import BodyLimit
from serving.config import Profile
from serving.convert import read_document
from serving.errors import ProblemError, problem_for

TENANT = "default"  # one tenant owns everything until keys tell them apart

_PAGE = Path(__file__).parent / "static" / "index.html"
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {"schema": _ref}}}
    for _ref in [{"$ref": "#/components/schemas/ProblemOut"}]
    for status, text in {
        400: "The request cannot be read",
        404: "No such memory, document or page",
        409: "The memory is in the wrong state for this",
        413: "The request is larger than the server takes",
        415: "The content type is none that this route takes",
        422: "The request is readable and cannot be done as it is",
        503: "A part of the server is not available just now; try again after Retry-After seconds",
    }.items()
}
_CREATE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/CreateMemory"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "id": {"type": "string"},
                        "title": {"type": "string"},
                        "ratio": {"type": "integer"},
                    },
                }
            },
        },
    }
}
_SSE = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}

MemoryId = Annotated[str, "the memory's id"]


def http_app(body_bytes: int) -> FastAPI:
    """The FastAPI application; `body_bytes` bounds a request's body."""
    app = FastAPI(
        lifespan=_connected,
        title="MemoRAG serving",
        version="1",
        description="Texts become memories; questions are answered from the passages that clues, recalled from "
        "memory, lead to. Errors are RFC 9457 problems.",
        responses=_PROBLEMS,
        generate_unique_id_function=lambda route: route.name,
    )
    app.add_middleware(BodyLimit, limit_bytes=body_bytes)
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_failure)
    _add_memory_routes(app)
    _add_question_routes(app)
    _add_other_routes(app)
    _add_schemas(app, api.CreateMemory, api.ProblemOut)
    return app


@asynccontextmanager
async def _connected(app: FastAPI) -> AsyncIterator[None]:
    """Finds the Router of the Serve application that this replica belongs to."""
    app.state.router = serve.get_deployment_handle("Router", serve.get_replica_context().app_name)
    yield


def _add_memory_routes(app: FastAPI) -> None:
    @app.post("/v1/memories", status_code=202, openapi_extra=_CREATE_BODY)
    async def create_memory(request: Request) -> api.MemoryOut:
        """Make a memory of documents. Answers at once; follow `/events` until it is ready."""
        return await _router(request).create.remote(TENANT, await _creation(request))

    @app.get("/v1/memories")
    async def list_memories(
        request: Request, cursor: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> api.MemoryList:
        """All memories, by id, in pages."""
        return await _router(request).list_memories.remote(TENANT, cursor, limit)

    @app.get("/v1/memories/{memory}")
    async def get_memory(request: Request, memory: MemoryId) -> api.MemoryOut:
        """One memory, with its state and sizes."""
        return await _router(request).get.remote(TENANT, memory)

    @app.delete("/v1/memories/{memory}", status_code=204)
    async def delete_memory(request: Request, memory: MemoryId) -> None:
        """Delete a memory, whatever its state."""
        await _router(request).delete.remote(TENANT, memory)

    @app.get("/v1/memories/{memory}/documents/{document}", response_class=PlainTextResponse)
    async def get_document(request: Request, memory: MemoryId, document: str) -> PlainTextResponse:
        """The text of a document; every offset in answers counts its characters."""
        return PlainTextResponse(await _router(request).source.remote(TENANT, memory, document))

    @app.get("/v1/memories/{memory}/events", responses={200: _SSE}, response_class=EventSourceResponse)
    async def memory_events(request: Request, memory: MemoryId) -> EventSourceResponse:
        """Server-sent events: `progress` while the memory is made, then `ready` or `failed`."""
        return await _events(_router(request).options(stream=True).events.remote(TENANT, memory))


def _add_question_routes(app: FastAPI) -> None:
    @app.post("/v1/memories/{memory}/answer", response_model=api.Answer)
    async def answer(request: Request, memory: MemoryId, question: api.Question) -> api.Answer | EventSourceResponse:
        """Answer a question; with `stream`, as server-sent events clue, passage, token, then done or error."""
        return await _ask(request, memory, question)

    @app.post("/v1/memories/{memory}/summary", response_model=api.Answer)
    async def summary(request: Request, memory: MemoryId, query: api.SummaryQuery) -> api.Answer | EventSourceResponse:
        """Summarize the memory: key points are recalled, their passages found, the summary written from those."""
        return await _ask(request, memory, api.Question.model_construct(question="", task="summarize", **dict(query)))

    @app.post("/v1/memories/{memory}/clues")
    async def clues(request: Request, memory: MemoryId, query: api.CluesQuery) -> api.CluesOut:
        """Only recall: the clues that the memory gives for a question."""
        return await _router(request).clues.remote(TENANT, memory, query)

    @app.post("/v1/memories/{memory}/passages")
    async def passages(request: Request, memory: MemoryId, query: api.PassagesQuery) -> api.PassagesOut:
        """Only retrieval: the passages that match a text."""
        return await _router(request).passages.remote(TENANT, memory, query)


def _add_other_routes(app: FastAPI) -> None:
    @app.get("/healthz")
    async def healthz() -> api.Health:
        """The ingress is alive."""
        return api.Health(status="ok")

    @app.get("/readyz")
    async def readyz(request: Request) -> api.Readiness:
        """Every pool answers."""
        return await _router(request).ready.remote()

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE, headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline'"})


def ingress_deployment(profile: Profile) -> serve.Deployment:
    """The Ingress on the CPU pool of `profile`; bind it to the Router's application."""
    body_bytes = profile.limits.body_bytes

    def build() -> FastAPI:  # on the replica; Serve takes a function without parameters and nothing else
        return http_app(body_bytes)

    return serve.deployment(serve.ingress(build)(), name="Ingress", **profile.pools.cpu.deployment_options())


# -- reading requests --------------------------------------------------------------------------------------


async def _creation(request: Request) -> api.CreateMemory:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            return await asyncio.to_thread(_parsed, await request.body())
        except UnicodeDecodeError as error:
            raise ProblemError(400, f"the body is not UTF-8 (byte {error.start}); encode it as UTF-8") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ProblemError(400, f"the body is not JSON: {error}; see /docs for its shape") from None
    if kind == "multipart/form-data":
        return await _multipart(request)
    raise ProblemError(415, f"content type {kind or 'missing'!r}; send application/json or multipart/form-data")


async def _multipart(request: Request) -> api.CreateMemory:
    documents: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    try:
        async with request.form() as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    documents.append(await _uploaded(value, len(documents) + 1))
                else:
                    fields[name] = value
    except (MultiPartException, HTTPException) as error:
        raise ProblemError(400, f"the multipart body cannot be read: {getattr(error, 'detail', error)}") from None
    if not documents:
        raise ProblemError(422, "no file was sent; send one or more in the field 'files'")
    return _validated({**fields, "documents": documents})


async def _uploaded(file: UploadFile, number: int) -> dict[str, str]:
    """An uploaded file as a document of `CreateMemory`."""
    data = await file.read()
    try:
        text = await asyncio.to_thread(read_document, file.filename or "file.txt", data)
    except Exception as error:
        raise problem_for(error) from error
    return {"id": _document_id(file.filename, number), "text": text}


def _parsed(body: bytes) -> api.CreateMemory:
    return _validated(json.loads(body))


def _validated(values: Any) -> api.CreateMemory:
    try:
        return api.CreateMemory.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _document_id(filename: str | None, number: int) -> str:
    """A document's id from its file name: only what ids may hold, never a path."""
    stem = Path((filename or "").replace("\\", "/")).name
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem).lstrip("._-")
    return kept[:128] or f"doc-{number}"


def _router(request: Request) -> DeploymentHandle:
    return request.app.state.router


# -- writing responses -------------------------------------------------------------------------------------


async def _ask(request: Request, memory: str, question: api.Question) -> api.Answer | EventSourceResponse:
    if question.stream:
        return await _events(_router(request).options(stream=True).ask.remote(TENANT, memory, question))
    return await _router(request).answer.remote(TENANT, memory, question)


async def _events(events: Any) -> EventSourceResponse:
    """The Router's events as server-sent events. A failure before the first is an ordinary problem response."""
    iterator = aiter(events)
    first: api.Event = await anext(iterator)
    if first.name == "error":
        members = {k: v for k, v in first.data.items() if k not in ("type", "title", "status", "detail")}
        raise ProblemError(first.data["status"], first.data["detail"], members)

    async def lines() -> AsyncIterator[ServerSentEvent]:
        try:
            yield _line(first)
            async for event in iterator:
                yield _line(event)
        finally:  # the client may have gone: what is still being made for it is cancelled
            events.cancel()

    return EventSourceResponse(lines(), headers={"Cache-Control": "no-store"})


def _line(event: api.Event) -> ServerSentEvent:
    return ServerSentEvent(event=event.name, data=json.dumps(event.data, ensure_ascii=False))


async def _on_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return JSONResponse(
        error.body(), status_code=error.status, headers=error.headers, media_type="application/problem+json"
    )


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if "json" not in (kind := request.headers.get("content-type", "")) and "body" in error.errors()[0]["loc"]:
        problem = ProblemError(415, f"content type {kind or 'missing'!r}; send application/json")
        return await _on_problem(request, problem)
    problems = [(".".join(str(part) for part in e["loc"] if part != "body"), e["msg"]) for e in error.errors()]
    detail = "; ".join(f"{where}: {what}" if where else what for where, what in problems[:5])
    status = 400 if any(e["type"] == "json_invalid" for e in error.errors()) else 422
    return await _on_problem(request, ProblemError(status, f"{detail}; see /docs for the request's shape"))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = {
        400: "the body cannot be read; send JSON in UTF-8",
        404: f"there is no {request.url.path}; GET /docs lists the routes, GET /v1/memories the memories",
        405: f"{request.url.path} does not take {request.method}; GET /docs lists the routes",
    }.get(error.status_code, error.detail)
    return await _on_problem(request, ProblemError(error.status_code, detail))


async def _on_failure(request: Request, error: Exception) -> Response:
    return await _on_problem(request, problem_for(error))


def _add_schemas(app: FastAPI, *models: type[BaseModel]) -> None:
    """Puts models that only `openapi_extra` refers to among the document's components."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in models:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        return document

    app.openapi = openapi  # type: ignore[method-assign]
