"""Whether the running model can use a memory: asked by the Router."""

from memory_worker.errors import WrongModel
from memory_worker.manifest import Manifest
from memory_worker.messages import MemorizerDescription
from memory_worker.models.fingerprint import fingerprint_of


def require_same_model(manifest: Manifest, model: MemorizerDescription, name: str | None = None) -> None:
    """Raises `WrongModel` where another model, or another recipe of the kind, made the memory; `name` is its own."""
    running = fingerprint_of(manifest.kind, model.fingerprint)
    if manifest.fingerprint != running:
        raise WrongModel(name or manifest.memory, manifest.fingerprint, running)
