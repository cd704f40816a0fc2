"""What can be wrong with a memory, each error with its remedy: raised by the store, the keeper, the catalog
and the Memorizer, and mapped to HTTP by the serving room. Their arguments alone rebuild them, so they cross
processes."""

from cluster.storage import DamagedFile


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
    """The memory leaves no room for a question in the engine's context window. Tokens throughout."""

    def __init__(self, memory: str, slots: int, max_model_len: int) -> None:
        super().__init__(memory, slots, max_model_len)
        self.memory, self.slots, self.max_model_len = memory, slots, max_model_len

    def __str__(self) -> str:
        return (
            f"the memory {self.memory!r} has {self.slots} slots, too many to be asked within the engine's "
            f"{self.max_model_len} tokens: raise memory.engine.max_model_len, or memorize at a higher ratio"
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
