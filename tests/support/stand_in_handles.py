"""Deployments and actors in this process: objects with the methods of real ones, called as Ray's handles are."""

from types import SimpleNamespace


class Handle:
    """`handle.method.remote(…)` of an object's async methods and generators; `options` changes nothing."""

    def __init__(self, target: object) -> None:
        self._target = target

    def options(self, **_: object) -> "Handle":
        return self

    def __getattr__(self, name: str) -> SimpleNamespace:
        def remote(*arguments, **named):
            result = getattr(self._target, name)(*arguments, **named)
            return Stream(result) if hasattr(result, "__aiter__") else result

        return SimpleNamespace(remote=remote)


class Stream:
    """What a streaming call gives: can be cancelled."""

    def __init__(self, items) -> None:
        self._items = items
        self.cancelled = False

    def __aiter__(self):
        return aiter(self._items)

    def cancel(self) -> None:
        self.cancelled = True
