"""Requests that bring documents: parsed, their texts made durable, their job begun. Called by the Ingress's routes.

Texts go from the request to storage without passing through the Router: it only says where they go (`reserve`), and
is told when they are there.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import IO, Any, NamedTuple

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from cluster.storage.durable import Storage
from memory_worker.manifest import JobRecord, MemoryKey
from memory_worker.messages import Reservation
from memory_worker.storage.store import check_id, source_path
from serving import api
from serving.config import LimitsConfig
from serving.documents.archive import MEDIA_TYPE, Archive
from serving.documents.convert import detect_language
from serving.documents.uploads import StoredText, document_id, store_file, store_text
from serving.errors import ProblemError

_MEMORY_BYTES = 1 << 20  # of a body that is held in memory before it goes to disk


class _Incoming(NamedTuple):
    """A document of a request: its id, and what stores its text under a path."""

    id: str
    store: Callable[[str], StoredText]


class Receiver:
    """The way into storage. One for each Ingress replica."""

    def __init__(self, storage: Storage, limits: LimitsConfig) -> None:
        self._storage = storage
        self._limits = limits
        self._converting = ThreadPoolExecutor(limits.conversions, thread_name_prefix="store")

    async def create(self, request: Request, router: DeploymentHandle, tenant: str) -> api.MemoryOut:
        """A new memory of the documents in the request, JSON or multipart. Raises `ProblemError`."""
        kind = _content_type(request)
        if kind == "application/json":
            wanted = await _json(request, api.CreateMemory)
            names = (f"doc-{number}" if d.id is None else d.id for number, d in enumerate(wanted.documents, 1))
            texts = [self._text(id, d.text) for id, d in zip(names, wanted.documents, strict=True)]
            return await self._create(router, tenant, wanted, texts)
        if kind == "multipart/form-data":
            async with _form(request, self._limits.documents) as form:
                files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
                if not files:
                    raise ProblemError(422, "no file was sent; send one or more in the field 'files'")
                fields: dict[str, Any] = {k: v for k, v in form.multi_items() if not isinstance(v, UploadFile)}
                fields["tags"] = [tag for tag in form.getlist("tags") if isinstance(tag, str)]
                placeholder = [{"text": "in its file"}]
                wanted = validate(api.CreateMemory, {**fields, "documents": placeholder})
                named = [(document_id(file.filename, number), file) for number, file in enumerate(files, 1)]
                documents = [self._file(id, file.filename, file.file) for id, file in named]
                return await self._create(router, tenant, wanted, documents)
        if kind == MEDIA_TYPE:
            return await self._import(request, router, tenant)
        raise ProblemError(
            415, f"content type {kind or 'missing'!r}; send application/json, multipart/form-data or {MEDIA_TYPE}"
        )

    async def put(
        self, request: Request, router: DeploymentHandle, tenant: str, memory: str, document: str
    ) -> api.MemoryOut:
        """A document of a memory, added or replaced: JSON, plain text, or a multipart file. Raises `ProblemError`."""
        kind = _content_type(request)
        if kind == "application/json":
            text = (await _json(request, api.PutDocument)).text
            return await self._put(request, router, tenant, memory, self._text(document, text))
        if kind in ("text/plain", "text/markdown"):
            with tempfile.SpooledTemporaryFile(_MEMORY_BYTES) as spooled:
                async for piece in request.stream():
                    await asyncio.to_thread(spooled.write, piece)
                incoming = self._file(document, f"{document}.txt", spooled)
                return await self._put(request, router, tenant, memory, incoming)
        if kind == "multipart/form-data":
            async with _form(request, 1) as form:
                files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
                if len(files) != 1:
                    raise ProblemError(422, f"{len(files)} files were sent; send one in the field 'file'")
                incoming = self._file(document, files[0].filename, files[0].file)
                return await self._put(request, router, tenant, memory, incoming)
        raise ProblemError(
            415, f"content type {kind or 'missing'!r}; send application/json, text/plain or multipart/form-data"
        )

    async def _create(
        self, router: DeploymentHandle, tenant: str, wanted: api.CreateMemory, documents: Sequence[_Incoming]
    ) -> api.MemoryOut:
        _check_ids([document.id for document in documents])
        key, job = await router.reserve.remote(
            tenant, wanted.id, wanted.title, wanted.tags, wanted.kind, wanted.ratio, len(documents)
        )
        return await self._begin(router, key, job, documents)

    async def _import(self, request: Request, router: DeploymentHandle, tenant: str) -> api.MemoryOut:
        """A new memory of an archive; its id is the archive's own, or the query's `id`."""
        with tempfile.TemporaryFile() as spooled:
            async for piece in request.stream():
                await asyncio.to_thread(spooled.write, piece)
            spooled.seek(0)
            archive = await asyncio.to_thread(Archive, spooled)
            memory = request.query_params.get("id", archive.manifest.memory)
            reserved: Reservation = await router.reserve_import.remote(tenant, memory, archive.manifest)
            try:
                manifest = await asyncio.to_thread(archive.unpack, self._storage, reserved.key)
                return await router.adopt.remote(manifest)
            except BaseException:
                await router.abandon.remote(reserved.key)
                raise

    async def _put(
        self, request: Request, router: DeploymentHandle, tenant: str, memory: str, document: _Incoming
    ) -> api.MemoryOut:
        key, job = await router.reserve_change.remote(tenant, memory, document.id, if_match(request))
        return await self._begin(router, key, job, [document])

    async def _begin(
        self, router: DeploymentHandle, key: MemoryKey, job: JobRecord, documents: Sequence[_Incoming]
    ) -> api.MemoryOut:
        """Stores the texts and begins the job that makes a version of them; gives the version up where that fails."""
        try:
            stored = [await self._store(document, key) for document in documents]
            language = job.language or await asyncio.to_thread(detect_language, stored[0].sample)
            texts = tuple(each.document for each in stored)
            return await router.begin.remote(key, job.model_copy(update={"documents": texts, "language": language}))
        except BaseException:
            await router.abandon.remote(key)
            raise

    def _text(self, id: str, text: str) -> _Incoming:
        return _Incoming(id, lambda path: store_text(self._storage, path, id, text))

    def _file(self, id: str, name: str | None, file: IO[bytes]) -> _Incoming:
        def store(path: str) -> StoredText:
            file.seek(0)
            return store_file(self._storage, path, id, name or "file.txt", file, self._limits.convert)

        return _Incoming(id, store)

    async def _store(self, document: _Incoming, key: MemoryKey) -> StoredText:
        """Stores a text in one of the few threads that texts are made and written in."""
        path = source_path(key, document.id)
        return await asyncio.get_running_loop().run_in_executor(self._converting, document.store, path)


def if_match(request: Request) -> str | None:
    """The version that the request's `If-Match` header names; none where any will do."""
    header = ",".join(request.headers.getlist("if-match")).strip()
    if header in ("", "*"):
        return None
    if len(header) < 3 or not (header.startswith('"') and header.endswith('"')) or "," in header:
        raise ProblemError(400, f"If-Match is {header[:80]!r}; send one ETag, in double quotes, as GET gave it")
    return header[1:-1]


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _json(request: Request, model: type[BaseModel]) -> Any:
    body = await request.body()
    try:
        values = await asyncio.to_thread(json.loads, body)
    except UnicodeDecodeError as error:
        raise ProblemError(400, f"the body is not UTF-8 (byte {error.start}); encode it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is no `JSONDecodeError`
        raise ProblemError(400, f"the body is not JSON: {error}; see /docs for its shape") from None
    return await asyncio.to_thread(validate, model, values)


def validate(model: type[BaseModel], values: Any) -> Any:
    """As FastAPI validates a body. Raises `RequestValidationError`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


@asynccontextmanager
async def _form(request: Request, files: int) -> AsyncIterator[FormData]:
    """The form of a multipart request, its files spooled to disk."""
    try:
        form = await request.form(max_files=files, max_fields=100)
    except (MultiPartException, HTTPException) as error:
        detail = getattr(error, "detail", error)
        status = 413 if "Too many files" in str(detail) else 400
        raise ProblemError(status, f"the multipart body cannot be read: {detail}") from None
    try:
        yield form
    finally:
        await form.close()


def _check_ids(ids: Sequence[str]) -> None:
    for number, id in enumerate(ids):
        check_id(id, "document")
        if id in ids[:number]:
            raise ProblemError(422, f"two documents are called {id!r}; give each its own id")
