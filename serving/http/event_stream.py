"""The Router's events as server-sent events, in the form that a route sends them."""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Any, Protocol

from sse_starlette import EventSourceResponse, ServerSentEvent

from serving import api
from serving.errors import ProblemError, problem_for
from serving.http.admission import InFlight

# Within JSON's strings only; many clients break lines there, as Python's `splitlines` does.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


class EventForm(Protocol):
    """How events are written."""

    def lines(self, event: api.Event) -> Iterable[ServerSentEvent]:
        """What is sent of an event."""

    def failure(self, problem: ProblemError) -> ServerSentEvent:
        """What a stream that has begun ends with."""


class NamedEvents:
    """Each event as it is, by its name."""

    def lines(self, event: api.Event) -> Iterable[ServerSentEvent]:
        yield ServerSentEvent(event=event.name, data=write_data(event.data))

    def failure(self, problem: ProblemError) -> ServerSentEvent:
        return ServerSentEvent(event="error", data=write_data(problem.body()))


async def stream_events(
    events: Any, counted: InFlight | None = None, form: EventForm | None = None
) -> EventSourceResponse:
    """A response of `events`, a stream of the Router's. A failure before the first is an ordinary problem response."""
    written = form or NamedEvents()
    async with AsyncExitStack() as beginning:
        beginning.callback(events.cancel)  # of what is still being made where the client has gone
        if counted:
            await beginning.enter_async_context(counted)
        iterator = aiter(events)
        first: api.Event = await anext(iterator)
        begun = beginning.pop_all()

    async def lines() -> AsyncIterator[ServerSentEvent]:
        async with begun:
            try:
                for line in written.lines(first):
                    yield line
                async for event in iterator:
                    for line in written.lines(event):
                        yield line
            except Exception as error:  # noqa: BLE001  the response has begun: it ends with what went wrong
                yield written.failure(problem_for(error))

    return EventSourceResponse(lines(), headers={"Cache-Control": "no-store"})


def write_data(data: dict[str, Any]) -> str:
    """JSON on one line, whatever a client takes for the end of one."""
    return json.dumps(data, ensure_ascii=False).translate(_LINE_ENDS)
