"""An actor without a process of its own, for tests of what an actor knows: Ray's processes take seconds each.

It has what counts of a real one: calls run at once, in a thread of the actor's own; arguments, results and errors are
pickled; after a death the successor is made of the same arguments, and calls under way are made again.
"""

import asyncio
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any


class LocalActor:
    """`actor.method.remote(...)` gives what can be awaited, as a handle of Ray does; outside a loop, a future."""

    def __init__(self, cls: Callable[..., Any], *arguments: Any) -> None:
        self._cls, self._arguments = cls, pickle.dumps(arguments)
        self._waiting: dict[Future[Any], tuple[str, bytes]] = {}
        self._start()

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=partial(self._call, method))

    def die(self) -> None:
        """What it holds in memory is gone; a successor is there when this returns."""
        self.end()
        self._start()
        for reply, call in [*self._waiting.items()]:
            asyncio.run_coroutine_threadsafe(self._answer(self._object, reply, *call), self._loop)

    def end(self) -> None:
        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self) -> None:
        async def make() -> Any:
            return self._cls(*pickle.loads(self._arguments))  # noqa: S301

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._object = asyncio.run_coroutine_threadsafe(make(), self._loop).result()

    def _call(self, method: str, *arguments: Any, **named: Any) -> "asyncio.Future[Any] | Future[Any]":
        reply: Future[Any] = Future()
        call = method, pickle.dumps((arguments, named))
        self._waiting[reply] = call
        asyncio.run_coroutine_threadsafe(self._answer(self._object, reply, *call), self._loop)
        try:
            return asyncio.wrap_future(reply, loop=asyncio.get_running_loop())
        except RuntimeError:
            return reply

    async def _answer(self, of: Any, reply: "Future[Any]", method: str, call: bytes) -> None:
        arguments, named = pickle.loads(call)  # noqa: S301
        try:
            result = pickle.dumps((await getattr(of, method)(*arguments, **named), None))
        except Exception as error:  # noqa: BLE001  it is the caller's, as with Ray
            result = pickle.dumps((None, error))
        value, failed = pickle.loads(result)  # noqa: S301
        if self._waiting.pop(reply, None) and reply.set_running_or_notify_cancel():
            reply.set_exception(failed) if failed else reply.set_result(value)
