"""Which passages' sentences were lately embedded ahead of an answer: kept by the Router, for its inquiries."""

from retrieval_worker.messages import Index

_AT_MOST = 2048  # fewer than a Retriever keeps


class Prepared:
    """Passages whose sentences were sent to be embedded: the Retriever still has them, with luck."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], None] = {}  # index, passage

    def take_missing(self, index: Index, passages: tuple[int, ...]) -> tuple[int, ...]:
        """Those of `passages` not asked for before; they count as prepared from now on."""
        keys = [(index.name, passage) for passage in passages]
        missing = tuple(passage for key, passage in zip(keys, passages, strict=True) if key not in self._known)
        if len(self._known) > _AT_MOST:
            self._known.clear()
        self._known.update(dict.fromkeys(keys))
        return missing
