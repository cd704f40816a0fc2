"""Which kind a memory is made as, and whether the running model can use one: asked by the Router."""

from cluster.planning.costs import MemoryKind
from memory_worker.errors import WrongModel
from memory_worker.messages import MemorizerDescription
from memory_worker.models.fingerprint import fingerprint_of
from memory_worker.storage.manifest import Manifest
from serving.errors import problem_for


def choose_kind(
    model: MemorizerDescription, kind: MemoryKind | None, ratio: int | None, usual_ratio: int
) -> tuple[MemoryKind, int]:
    """As `MemorizerDescription.choose_kind`. Raises `ProblemError`."""
    try:
        return model.choose_kind(kind, ratio, usual_ratio)
    except Exception as error:
        raise problem_for(error) from error


def require_same_model(manifest: Manifest, model: MemorizerDescription, name: str | None = None) -> None:
    """Raises `ProblemError` where another model, or another recipe of the kind, made the memory; `name` is its own."""
    running = fingerprint_of(manifest.kind, model.fingerprint)
    if manifest.fingerprint != running:
        raise problem_for(WrongModel(name or manifest.memory, manifest.fingerprint, running))
