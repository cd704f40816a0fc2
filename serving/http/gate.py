"""What every request under /v1 passes before its body is read: whose it is, and whether that tenant may ask now."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.storage.durable import Storage
from memory_worker.catalog.actor import catalog
from serving.config import Profile
from serving.errors import problem_for
from serving.http.admission import Admission
from serving.http.keys import Authenticator
from serving.http.problems import problem_response


class Gate:
    """Keys and rates, as one Ingress replica holds callers to them."""

    def __init__(self, profile: Profile, storage_root: str) -> None:
        self.storage = Storage(storage_root)
        self._authenticator = Authenticator(self.storage, profile.auth.mode)
        actor = catalog(storage_root, profile.ray.namespace, profile.memory.catalog, profile.quotas)
        self._admission = Admission(profile.quotas, actor.grant.remote)

    async def pass_through(self, authorization: str | None, scope: Scope) -> None:
        """Notes the caller's tenant in the request's state. Raises `ProblemError` 401, 429 or 503."""
        tenant = await self._authenticator.tenant_of(authorization)
        scope.setdefault("state", {})["tenant"] = tenant
        await self._admission.admit(tenant)


class Gated:
    """ASGI middleware over the `Gate` in the application's state. A caller without a key cannot send a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            gate: Gate = scope["app"].state.gate
            try:
                await gate.pass_through(Headers(scope=scope).get("authorization"), scope)
            except Exception as error:  # noqa: BLE001  outside the application nobody else makes it a problem
                await problem_response(problem_for(error))(scope, receive, send)
                return
        await self._app(scope, receive, send)
