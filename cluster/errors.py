"""The one base of every error that somebody can act on, and what Ray makes of an error on its way undone.

Whatever derives from `ExpectedError` says what to do: over HTTP it becomes a problem with its `status`
(`serving.errors.problem_for`), on the command line its message and exit code 1. Anything else is a bug, and shows its
stack. No heavy import here: the command line and the clients know these classes, too.
"""

from dataclasses import dataclass, field, fields
from typing import Any, dataclass_transform


@dataclass_transform(eq_default=False, field_specifiers=(field,))
class ExpectedError(Exception):
    """A failure with its remedy. A subclass names its fields, its message and its HTTP status, once:

        class MemoryNotFound(ExpectedError):
            memory: str
            status = 404
            template = "there is no memory {memory!r}; create it first, or list the memories there are"

    It is a dataclass: fields are the constructor's parameters, in their order, and all that another process needs to
    make it again. The template, as of `str.format`, may name properties, too.
    """

    status: int = 500  # of HTTP
    template: str = ""
    passing: bool = False  # whether a process that died is to blame: the same call may succeed with its successor

    def __init_subclass__(cls) -> None:
        if "__annotations__" in vars(cls):  # else it has its parent's fields, or is Ray's class of two parents
            dataclass(eq=False)(cls)

    def __str__(self) -> str:
        return self.template.format_map(_Attributes(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


class MessageError(ExpectedError):
    """One whose message is said where it is raised."""

    message: str
    template = "{message}"


class EngineFailed(MessageError):
    """The engine ended a request with an error; the request may be tried again."""

    status = 503
    passing = True


def cause_of(error: BaseException) -> BaseException:
    """What was raised, without the wrappings of Ray and of task groups."""
    from ray.exceptions import RayTaskError

    while True:
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
        elif isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            return error


class _Attributes(dict[str, Any]):
    """An object's attributes, as a template asks for them."""

    def __init__(self, of: object) -> None:
        super().__init__()
        self._of = of

    def __missing__(self, name: str) -> Any:
        return getattr(self._of, name)
