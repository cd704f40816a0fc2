"""What can be wrong with a memory, each error with its remedy: raised by the store, the keeper, the catalog
and the Memorizer, and mapped to HTTP by the serving room. Their arguments alone rebuild them, so they cross
processes."""

from cluster.storage.durable import DamagedFile


class MemoryProblem(Exception):
    """Base of all: `args` are the constructor's arguments, `str()` is the message."""


class InvalidId(MemoryProblem):
    """A tenant, memory, version or document id that cannot name a file."""

    def __init__(self, what: str, id: str) -> None:
        super().__init__(what, id)
        self.what, self.id = what, id

    def __str__(self) -> str:
        shown = self.id if len(self.id) <= 140 else self.id[:137] + "..."
        return (
            f"{shown!r} is not a {self.what} id: use 1 to 128 of the letters a-z and A-Z, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )


class MemoryNotFound(MemoryProblem):
    """There is no memory of this name."""

    def __init__(self, memory: str) -> None:
        super().__init__(memory)
        self.memory = memory

    def __str__(self) -> str:
        return f"there is no memory {self.memory!r}; create it first, or list the memories there are"


class MemoryExists(MemoryProblem):
    """The name is taken by a memory that is ready or being made."""

    def __init__(self, memory: str) -> None:
        super().__init__(memory)
        self.memory = memory

    def __str__(self) -> str:
        return f"the memory {self.memory!r} exists already; choose another id, or delete it first"


class MemoryNotReady(MemoryProblem):
    """The memory is still being made, or making it failed; `status` is memorizing or failed."""

    def __init__(self, memory: str, status: str, error: str | None = None) -> None:
        super().__init__(memory, status, error)
        self.memory, self.status, self.error = memory, status, error

    def __str__(self) -> str:
        if self.status == "failed":
            return f"making the memory {self.memory!r} failed: {self.error}; create it again under the same id"
        return f"the memory {self.memory!r} is still being made; wait for its `ready` event and ask again"


class EmptyDocument(MemoryProblem):
    """A document has no tokens to memorize."""

    def __init__(self, document: str) -> None:
        super().__init__(document)
        self.document = document

    def __str__(self) -> str:
        return f"the document {self.document!r} has no text; leave it out, or send its text"


class DamagedMemory(DamagedFile):
    """A file of a memory is intact by its digest, or has none, but does not say what it should."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)

    def __reduce__(self) -> tuple[type["DamagedMemory"], tuple[str, str]]:
        return (DamagedMemory, (self.path, self.reason))


class WrongModel(MemoryProblem):
    """The memory was encoded by another memory model than the one that is asked to use it."""

    def __init__(self, memory: str, encoded_by: str, running: str) -> None:
        super().__init__(memory, encoded_by, running)
        self.memory, self.encoded_by, self.running = memory, encoded_by, running

    def __str__(self) -> str:
        return (
            f"the memory {self.memory!r} was encoded by the model {self.encoded_by[:12]}, but {self.running[:12]} is "
            f"running; start the model it came from, or encode it again: `memorag memories delete {self.memory}`, "
            f"then `memorag memorize FILE --id {self.memory}`"
        )


class MemoryTooLarge(MemoryProblem):
    """Slots that are read together leave no room for a question in a prompt. Tokens throughout."""

    def __init__(self, memory: str, slots: int, room: int) -> None:
        super().__init__(memory, slots, room)
        self.memory, self.slots, self.room = memory, slots, room

    def __str__(self) -> str:
        return (
            f"the memory {self.memory!r} has {self.slots} slots to be read together, more than the {self.room} that a "
            "prompt holds beside a question: raise memory.engine.max_model_len, or memorize it again"
        )


class WindowTooLarge(MemoryProblem):
    """Not even one window's slots fit a prompt. Tokens throughout."""

    def __init__(self, window: int, ratio: int, slots: int, room: int) -> None:
        super().__init__(window, ratio, slots, room)
        self.window, self.ratio, self.slots, self.room = window, ratio, slots, room

    def __str__(self) -> str:
        return (
            f"a window of {self.window} tokens at ratio {self.ratio} makes {self.slots} slots with the head, more than "
            f"the {self.room} that a prompt holds beside a question: memorize at a higher ratio, or raise "
            "memory.engine.max_model_len"
        )


class UnsupportedKind(MemoryProblem):
    """The memory model cannot make memories of this kind."""

    def __init__(self, kind: str, model: str, possible: tuple[str, ...]) -> None:
        super().__init__(kind, model, possible)
        self.kind, self.model, self.possible = kind, model, possible

    def __str__(self) -> str:
        return (
            f"no memory of kind {self.kind} can be made with {self.model}, which has no beacon weights: use one of "
            f"{', '.join(self.possible)}"
        )


class UnfitRatio(MemoryProblem):
    """The ratio is none that a memory of this kind can have."""

    def __init__(self, kind: str, ratio: int, window: int, fitting: tuple[int, ...]) -> None:
        super().__init__(kind, ratio, window, fitting)
        self.kind, self.ratio, self.window, self.fitting = kind, ratio, window, fitting

    def __str__(self) -> str:
        return (
            f"ratio {self.ratio} does not fit a {self.kind} memory, made of windows of {self.window} tokens; use one "
            f"of {', '.join(map(str, self.fitting))}"
        )


class MixedMemories(MemoryProblem):
    """Memories of different memory models, kinds or dtypes cannot stand behind one another."""

    def __init__(self, memory: str, other: str) -> None:
        super().__init__(memory, other)
        self.memory, self.other = memory, other

    def __str__(self) -> str:
        return (
            f"the memories {self.memory!r} and {self.other!r} were encoded by different models, as different kinds or "
            "in different dtypes: ask them apart, or memorize one of them again"
        )


class QuestionTooLong(MemoryProblem):
    """The question does not fit beside the memory. Tokens throughout, instruction included in the question's."""

    def __init__(self, tokens: int, room: int, slots: int, max_model_len: int) -> None:
        super().__init__(tokens, room, slots, max_model_len)
        self.tokens, self.room, self.slots, self.max_model_len = tokens, room, slots, max_model_len

    def __str__(self) -> str:
        return (
            f"the question has {self.tokens} tokens with its instruction, but beside {self.slots} memory slots and "
            f"what is to be written, the engine's {self.max_model_len} tokens leave {self.room}: shorten the question"
        )


class VersionChanged(MemoryProblem):
    """A change was asked of one version, and another is the newest now, or will be."""

    def __init__(self, memory: str, asked: str, now: str) -> None:
        super().__init__(memory, asked, now)
        self.memory, self.asked, self.now = memory, asked, now

    def __str__(self) -> str:
        return (
            f"the memory {self.memory!r} is at version {self.now!r} and not {self.asked!r}; read it again, and repeat "
            "the change if it is still wanted"
        )


class JobUnderWay(MemoryProblem):
    """The memory is being changed already: one change at a time."""

    def __init__(self, memory: str) -> None:
        super().__init__(memory)
        self.memory = memory

    def __str__(self) -> str:
        return (
            f"the memory {self.memory!r} is being changed by another request; follow its events, then repeat this one"
        )


class JobEnded(MemoryProblem):
    """The job that reports was cancelled, deleted, or given to another worker: what it does is in vain."""

    def __init__(self, memory: str) -> None:
        super().__init__(memory)
        self.memory = memory

    def __str__(self) -> str:
        return f"the job of the memory {self.memory!r} was cancelled, or is done by another worker"


class NoJob(MemoryProblem):
    """There is nothing to cancel."""

    def __init__(self, memory: str) -> None:
        super().__init__(memory)
        self.memory = memory

    def __str__(self) -> str:
        return f"the memory {self.memory!r} has no job under way"


class DocumentNotFound(MemoryProblem):
    """The memory has no such document."""

    def __init__(self, memory: str, document: str, present: tuple[str, ...]) -> None:
        super().__init__(memory, document, present)
        self.memory, self.document, self.present = memory, document, present

    def __str__(self) -> str:
        shown = ", ".join(self.present[:20]) + (", …" if len(self.present) > 20 else "")
        return f"the memory {self.memory!r} has no document {self.document!r}; it has {shown}"


class LastDocument(MemoryProblem):
    """A memory without documents cannot be asked."""

    def __init__(self, memory: str, document: str) -> None:
        super().__init__(memory, document)
        self.memory, self.document = memory, document

    def __str__(self) -> str:
        return f"{self.document!r} is the only document of the memory {self.memory!r}; delete the memory instead"


class QueueFull(MemoryProblem):
    """As many jobs are waiting as may wait."""

    def __init__(self, waiting: int) -> None:
        super().__init__(waiting)
        self.waiting = waiting

    def __str__(self) -> str:
        return f"{self.waiting} jobs are waiting already, which is all that may wait; try again later"


class QuotaExceeded(MemoryProblem):
    """The tenant would have more than its quota allows."""

    def __init__(self, what: str, limit: int, wanted: int) -> None:
        super().__init__(what, limit, wanted)
        self.what, self.limit, self.wanted = what, limit, wanted

    def __str__(self) -> str:
        return (
            f"this would make {self.wanted:,} {self.what}, and your quota is {self.limit:,}: delete what is no longer "
            "needed, or ask the operator for more"
        )


class LostRank(MemoryProblem):
    """A rank of a Memorizer died, failed or fell silent, and with it the group of windows under way."""

    def __init__(self, rank: int, ranks: int, reason: str) -> None:
        super().__init__(rank, ranks, reason)
        self.rank, self.ranks, self.reason = rank, ranks, reason

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of a Memorizer's {self.ranks} was lost: {self.reason}; its ranks are started anew for "
            "the next attempt, which goes on from the last checkpoint"
        )
