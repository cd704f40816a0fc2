"""Training of the memory model: the loss with gradients through beacons, data, the loop, and Ray Train around it."""

from memory_worker.training.config import RunConfig, TrainingError, load_run

__all__ = ["RunConfig", "TrainingError", "load_run"]
