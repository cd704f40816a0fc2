"""ASGI middleware by which `HEAD` answers wherever `GET` does: RFC 9110, §9.3.2."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class AnswersHead:
    """Sends what `GET` would begin its response with. Of a stream nothing is made beyond that."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_head(message: Message) -> None:
            nonlocal begun
            if not begun:
                begun = True
                await send(message)
                await send({"type": "http.response.body"})
                getting.cancel()

        getting = asyncio.ensure_future(self._app({**scope, "method": "GET"}, receive, send_head))
        try:
            await asyncio.wait({getting})
        finally:
            getting.cancel()
        if not begun:
            getting.result()
