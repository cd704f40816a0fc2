"""What can be wrong with a memory: raised by the store, the keeper, the catalog, the Memorizer and the Recaller."""

from cluster.errors import ExpectedError
from cluster.storage.durable import DamagedFile


class InvalidId(ExpectedError):
    """A tenant, memory, version or document id that cannot name a file."""

    what: str
    id: str
    status = 422
    template = (
        "{shown!r} is not a {what} id: use 1 to 128 of the letters a-z and A-Z, digits, '.', '_' and '-', "
        "beginning with a letter or digit"
    )

    @property
    def shown(self) -> str:
        return self.id if len(self.id) <= 140 else self.id[:137] + "..."


class MemoryNotFound(ExpectedError):
    """There is no memory of this name."""

    memory: str
    status = 404
    template = "there is no memory {memory!r}; create it first, or list the memories there are"


class MemoryExists(ExpectedError):
    """The name is taken by a memory that is ready or being made."""

    memory: str
    status = 409
    template = "the memory {memory!r} exists already; choose another id, or delete it first"


class MemoryNotReady(ExpectedError):
    """The memory is still being made, or making it failed; `state` is memorizing or failed."""

    memory: str
    state: str
    error: str | None = None
    status = 409
    template = "the memory {memory!r} is still being made; wait for its `ready` event and ask again"
    failed = "making the memory {memory!r} failed: {error}; create it again under the same id"

    def __post_init__(self) -> None:
        if self.state == "failed":
            self.template = self.failed


class EmptyDocument(ExpectedError):
    """A document has no tokens to memorize."""

    document: str
    status = 422
    template = "the document {document!r} has no text; leave it out, or send its text"


class DamagedMemory(DamagedFile):
    """A file of a memory is intact by its digest, or has none, but does not say what it should."""


class WrongModel(ExpectedError):
    """The memory was encoded by another memory model than the one that is asked to use it."""

    memory: str
    encoded_by: str
    running: str
    status = 409
    template = (
        "the memory {memory!r} was encoded by the model {encoded_by:.12}, but {running:.12} is running; start the "
        "model it came from, or encode it again: `memorag memories delete {memory}`, then `memorag memorize FILE "
        "--id {memory}`"
    )


class MemoryTooLarge(ExpectedError):
    """Slots that are read together leave no room for a question in a prompt. Tokens throughout."""

    memory: str
    slots: int
    room: int
    status = 422
    template = (
        "the memory {memory!r} has {slots} slots to be read together, more than the {room} that a prompt holds beside "
        "a question: raise memory.engine.max_model_len, or memorize it again"
    )


class WindowTooLarge(ExpectedError):
    """Not even one window's slots fit a prompt. Tokens throughout."""

    window: int
    ratio: int
    slots: int
    room: int
    status = 422
    template = (
        "a window of {window} tokens at ratio {ratio} makes {slots} slots with the head, more than the {room} that a "
        "prompt holds beside a question: memorize at a higher ratio, or raise memory.engine.max_model_len"
    )


class UnsupportedKind(ExpectedError):
    """The memory model cannot make memories of this kind."""

    kind: str
    model: str
    possible: tuple[str, ...]
    status = 422
    template = "no memory of kind {kind} can be made with {model}, which has no beacon weights: use one of {listed}"

    @property
    def listed(self) -> str:
        return ", ".join(self.possible)


class UnfitRatio(ExpectedError):
    """The ratio is none that a memory of this kind can have."""

    kind: str
    ratio: int
    window: int
    fitting: tuple[int, ...]
    status = 422
    template = "ratio {ratio} does not fit a {kind} memory, made of windows of {window} tokens; use one of {listed}"

    @property
    def listed(self) -> str:
        return ", ".join(map(str, self.fitting))


class MixedMemories(ExpectedError):
    """Memories of different memory models, kinds or dtypes cannot stand behind one another."""

    memory: str
    other: str
    status = 422
    template = (
        "the memories {memory!r} and {other!r} were encoded by different models, as different kinds or in different "
        "dtypes: ask them apart, or memorize one of them again"
    )


class QuestionTooLong(ExpectedError):
    """The question does not fit beside the memory. Tokens throughout, instruction included in the question's."""

    tokens: int
    room: int
    slots: int
    max_model_len: int
    status = 422
    template = (
        "the question has {tokens} tokens with its instruction, but beside {slots} memory slots and what is to be "
        "written, the engine's {max_model_len} tokens leave {room}: shorten the question"
    )


class VersionChanged(ExpectedError):
    """A change was asked of one version, and another is the newest now, or will be."""

    memory: str
    asked: str
    now: str
    status = 412
    template = (
        "the memory {memory!r} is at version {now!r} and not {asked!r}; read it again, and repeat the change if it is "
        "still wanted"
    )


class JobUnderWay(ExpectedError):
    """The memory is being changed already: one change at a time."""

    memory: str
    status = 412
    template = "the memory {memory!r} is being changed by another request; follow its events, then repeat this one"


class JobEnded(ExpectedError):
    """The job that reports was cancelled, deleted, or given to another worker: what it does is in vain."""

    memory: str
    template = "the job of the memory {memory!r} was cancelled, or is done by another worker"


class NoJob(ExpectedError):
    """There is nothing to cancel."""

    memory: str
    status = 409
    template = "the memory {memory!r} has no job under way"


class DocumentNotFound(ExpectedError):
    """The memory has no such document."""

    memory: str
    document: str
    present: tuple[str, ...]
    status = 404
    template = "the memory {memory!r} has no document {document!r}; it has {listed}"

    @property
    def listed(self) -> str:
        return ", ".join(self.present[:20]) + (", …" if len(self.present) > 20 else "")


class LastDocument(ExpectedError):
    """A memory without documents cannot be asked."""

    memory: str
    document: str
    status = 409
    template = "{document!r} is the only document of the memory {memory!r}; delete the memory instead"


class QueueFull(ExpectedError):
    """As many jobs are waiting as may wait."""

    waiting: int
    status = 429
    template = "{waiting} jobs are waiting already, which is all that may wait; try again later"


class QuotaExceeded(ExpectedError):
    """The tenant would have more than its quota allows."""

    what: str
    limit: int
    wanted: int
    status = 429
    template = (
        "this would make {wanted:,} {what}, and your quota is {limit:,}: delete what is no longer needed, or ask the "
        "operator for more"
    )


class LostRank(ExpectedError):
    """A rank of a Memorizer died, failed or fell silent, and with it the group of windows under way."""

    rank: int
    ranks: int
    reason: str
    status = 503
    passing = True
    template = (
        "rank {rank} of a Memorizer's {ranks} was lost: {reason}; its ranks are started anew for the next attempt, "
        "which goes on from the last checkpoint"
    )
