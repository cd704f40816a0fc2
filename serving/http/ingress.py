"""The HTTP ingress: FastAPI over the Router. Says who calls, refuses what may not be, streams events."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from ray import serve
from sse_starlette import EventSourceResponse

from cluster.planning.costs import MemoryKind
from cluster.storage.durable import StoredFile
from memory_worker.manifest import Manifest
from serving import api
from serving.config import Profile
from serving.documents.archive import MEDIA_TYPE, pack
from serving.documents.receive import Receiver, if_match
from serving.http.admission import InFlight
from serving.http.body_limit import BodyLimit
from serving.http.event_stream import stream_events
from serving.http.gate import Gate, Gated
from serving.http.head import AnswersHead
from serving.http.openai import add_openai_routes
from serving.http.openai_errors import OpenAIErrors
from serving.http.problems import STATUSES, add_error_handlers
from serving.http.state import Tenant, questions_of, router_of
from serving.router.usage_metrics import CountedRequests

_HOLD_S = 10.0  # how often the version that an export reads is kept from being deleted
_PAGE = Path(__file__).parent / "static" / "index.html"
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {"schema": _ref}}}
    for _ref in [{"$ref": "#/components/schemas/ProblemOut"}]
    for status, text in STATUSES.items()
}
_BINARY = {"type": "string", "format": "binary"}
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
                        "files": {"type": "array", "items": _BINARY},
                        "id": {"type": "string"},
                        "title": {"type": "string"},
                        "tags": {"type": "array", "items": {"type": "string"}},
                        "kind": {"type": "string", "enum": list(get_args(MemoryKind))},
                        "ratio": {"type": "integer"},
                    },
                }
            },
            MEDIA_TYPE: {"schema": _BINARY},
        },
    },
    "parameters": [
        {"name": "id", "in": "query", "schema": {"type": "string"}, "description": "of a memory made of an archive"}
    ],
}
_PUT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/PutDocument"}},
            "text/plain": {"schema": {"type": "string"}},
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {"file": _BINARY}}
            },
        },
    }
}
_TAR = {"content": {MEDIA_TYPE: {"schema": _BINARY}}}
_EVENT = {
    "type": "object",
    "description": "one event; `data` is JSON",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
_SSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}

MemoryId = Annotated[str, "the memory's id"]


def http_app(profile: Profile, storage_root: str) -> FastAPI:
    """The FastAPI application of one replica."""

    @asynccontextmanager
    async def connected(app: FastAPI) -> AsyncIterator[None]:
        """Finds the Router of the Serve application that this replica belongs to."""
        app.state.router = serve.get_deployment_handle("Router", serve.get_replica_context().app_name)
        app.state.gate = await asyncio.to_thread(Gate, profile, storage_root)
        app.state.receiver = Receiver(app.state.gate.storage, profile.limits)
        app.state.questions = InFlight(profile.limits.questions_in_flight)
        yield

    app = FastAPI(
        lifespan=connected,
        redirect_slashes=False,
        title="MemoRAG serving",
        version="1",
        description="Texts become memories; questions are answered from the passages that clues, recalled from "
        "memory, lead to. Errors are RFC 9457 problems.",
        responses=_PROBLEMS,
        generate_unique_id_function=lambda route: route.name,
    )
    app.add_middleware(BodyLimit, json_bytes=profile.limits.body_bytes, upload_bytes=profile.limits.upload_bytes)
    add_error_handlers(app)
    app.add_middleware(Gated)
    app.add_middleware(CountedRequests)
    app.add_middleware(OpenAIErrors)
    app.add_middleware(AnswersHead)
    _add_memory_routes(app)
    _add_document_routes(app)
    _add_question_routes(app)
    _add_other_routes(app)
    add_openai_routes(app)
    _add_schemas(app, api.CreateMemory, api.PutDocument, api.ProblemOut)
    return app


def _add_memory_routes(app: FastAPI) -> None:
    @app.post("/v1/memories", status_code=202, openapi_extra=_CREATE_BODY)
    async def create_memory(request: Request, response: Response, tenant: Tenant) -> api.MemoryOut:
        """Make a memory of documents. Answers at once; follow `/events` until it is ready."""
        return _tag(response, await request.app.state.receiver.create(request, router_of(request), tenant))

    @app.get("/v1/memories")
    async def list_memories(
        request: Request,
        tenant: Tenant,
        cursor: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        tag: str | None = None,
    ) -> api.MemoryList:
        """All memories, or those with a tag, by id, in pages."""
        return await router_of(request).list_memories.remote(tenant, cursor, limit, tag)

    @app.get("/v1/memories/{memory}")
    async def get_memory(request: Request, response: Response, tenant: Tenant, memory: MemoryId) -> api.MemoryOut:
        """One memory, with its state and sizes. The ETag is its version, for `If-Match`."""
        return _tag(response, await router_of(request).get.remote(tenant, memory))

    @app.delete("/v1/memories/{memory}", status_code=204)
    async def delete_memory(request: Request, tenant: Tenant, memory: MemoryId) -> None:
        """Delete a memory, whatever its state."""
        await router_of(request).delete.remote(tenant, memory)

    @app.delete("/v1/memories/{memory}/job", status_code=204)
    async def cancel_job(request: Request, tenant: Tenant, memory: MemoryId) -> None:
        """Cancel what is being made of a memory. One that was ready stays as it was."""
        await router_of(request).cancel.remote(tenant, memory)

    @app.get("/v1/memories/{memory}/events", responses=_SSE, response_class=EventSourceResponse)
    async def memory_events(request: Request, tenant: Tenant, memory: MemoryId) -> EventSourceResponse:
        """Server-sent events: `progress` while a memory is made or changed, then `ready` or `failed`."""
        return await stream_events(router_of(request).options(stream=True).events.remote(tenant, memory))

    @app.get("/v1/memories/{memory}/archive", responses={200: _TAR}, response_class=StreamingResponse)
    async def export_memory(request: Request, tenant: Tenant, memory: MemoryId) -> StreamingResponse:
        """The whole memory as one file, which `POST /v1/memories` takes as `application/x-tar`."""
        manifest: Manifest = await router_of(request).manifest.remote(tenant, memory)
        name = {"Content-Disposition": f'attachment; filename="{memory}.tar"'}
        return StreamingResponse(_archive(request, manifest), media_type=MEDIA_TYPE, headers=name)

    @app.get("/v1/usage")
    async def usage(request: Request, tenant: Tenant) -> api.UsageOut:
        """What the caller has, and may have."""
        return await router_of(request).usage.remote(tenant)


def _add_document_routes(app: FastAPI) -> None:
    @app.get("/v1/memories/{memory}/documents/{document}", response_class=PlainTextResponse)
    async def get_document(request: Request, tenant: Tenant, memory: MemoryId, document: str) -> PlainTextResponse:
        """The text of a document; every offset in answers counts its characters."""
        source: StoredFile = await router_of(request).source.remote(tenant, memory, document)
        text = await asyncio.to_thread(request.app.state.gate.storage.read, source)
        return PlainTextResponse(text.to_pybytes())

    @app.put("/v1/memories/{memory}/documents/{document}", status_code=202, openapi_extra=_PUT_BODY)
    async def put_document(
        request: Request, response: Response, tenant: Tenant, memory: MemoryId, document: str
    ) -> api.MemoryOut:
        """Add a document, or replace the one of that id. Answers at once; the present version is asked until `ready`.

        With `If-Match`, only if the memory is still at that version. One change at a time: 412 for a second one.
        """
        put = request.app.state.receiver.put
        return _tag(response, await put(request, router_of(request), tenant, memory, document))

    @app.delete("/v1/memories/{memory}/documents/{document}")
    async def delete_document(
        request: Request, response: Response, tenant: Tenant, memory: MemoryId, document: str
    ) -> api.MemoryOut:
        """Delete a document; no question sees it any more. `If-Match` as for PUT."""
        removed = await router_of(request).remove_document.remote(tenant, memory, document, if_match(request))
        return _tag(response, removed)


def _add_question_routes(app: FastAPI) -> None:
    @app.post("/v1/memories/{memory}/answer", response_model=api.Answer, responses=_SSE)
    async def answer(
        request: Request, tenant: Tenant, memory: MemoryId, question: api.Question
    ) -> api.Answer | EventSourceResponse:
        """Answer a question; with `stream`, as server-sent events clue, passage, token, then done or error."""
        return await _ask(request, tenant, [memory], None, question)

    @app.post("/v1/answer", response_model=api.Answer, responses=_SSE)
    async def answer_from_many(
        request: Request, tenant: Tenant, question: api.QuestionToMany
    ) -> api.Answer | EventSourceResponse:
        """Answer a question from several memories at once, as from one."""
        return await _ask(request, tenant, question.memories, question.tag, question)

    @app.post("/v1/memories/{memory}/summary", response_model=api.Answer, responses=_SSE)
    async def summary(
        request: Request, tenant: Tenant, memory: MemoryId, query: api.SummaryQuery
    ) -> api.Answer | EventSourceResponse:
        """Summarize the memory: key points are recalled, their passages found, the summary written from those."""
        question = api.Question.model_construct(question="", task="summarize", **dict(query))
        return await _ask(request, tenant, [memory], None, question)

    @app.post("/v1/memories/{memory}/clues")
    async def clues(request: Request, tenant: Tenant, memory: MemoryId, query: api.CluesQuery) -> api.CluesOut:
        """Only recall: the clues that the memory gives for a question."""
        async with questions_of(request):
            return await router_of(request).clues.remote(tenant, memory, query)

    @app.post("/v1/memories/{memory}/passages")
    async def passages(request: Request, tenant: Tenant, memory: MemoryId, query: api.PassagesQuery) -> api.PassagesOut:
        """Only retrieval: the passages that match a text."""
        async with questions_of(request):
            return await router_of(request).passages.remote(tenant, memory, query)


def _add_other_routes(app: FastAPI) -> None:
    @app.get("/healthz")
    async def healthz() -> api.Health:
        """The ingress is alive."""
        return api.Health(status="ok")

    @app.get("/readyz")
    async def readyz(request: Request) -> api.Readiness:
        """Every pool answers."""
        return await router_of(request).ready.remote()

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE, headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline'"})


def ingress_deployment(profile: Profile, storage_root: str) -> serve.Deployment:
    """The Ingress on the CPU pool of `profile`; bind it to the Router's application.

    A replica that is replaced ends its questions first.
    """

    def build() -> FastAPI:  # on the replica; Serve takes a function without parameters and nothing else
        return http_app(profile, storage_root)

    options = profile.pools.cpu.deployment_options() | {"graceful_shutdown_timeout_s": profile.limits.question_s}
    return serve.deployment(serve.ingress(build)(), name="Ingress", **options)


def _tag(response: Response, memory: api.MemoryOut) -> api.MemoryOut:
    response.headers["ETag"] = f'"{memory.version}"'
    return memory


async def _ask(
    request: Request, tenant: str, memories: list[str], tag: str | None, question: api.Question
) -> api.Answer | EventSourceResponse:
    questions = questions_of(request)
    if question.stream:
        asked = router_of(request).options(stream=True).ask
        return await stream_events(asked.remote(tenant, memories, tag, question), questions)
    async with questions:
        return await router_of(request).answer.remote(tenant, memories, tag, question)


async def _archive(request: Request, manifest: Manifest) -> AsyncIterator[bytes]:
    """The archive, whose version stays whole however slowly the client reads."""
    pieces = pack(request.app.state.gate.storage, manifest)
    held = time.monotonic()
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        if time.monotonic() - held > _HOLD_S:
            await router_of(request).hold.remote(manifest.key)
            held = time.monotonic()
        yield piece


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
