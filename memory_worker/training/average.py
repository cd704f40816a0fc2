"""The mean of runs that began from one model: better than each of them, and no larger.

"Model soups" (Wortsman et al., ICML 2022, arXiv 2203.05482): runs that differ in the order of their data stay in one
basin, and what is noise of the last steps in each cancels out. Of the embedded model, the mean of two quotes 90 % of a
chronicle's sentences where they quote 85 and 86 % (docs/training.md). Two runs of one thread use two cores better than
one run of two threads.
"""

from collections.abc import Sequence
from pathlib import Path

from memory_worker.models.beacon.checkpoint import read_config
from memory_worker.training.config import TrainingError
from memory_worker.training.state import read_weights, write_model


def average(models: Sequence[Path], output: Path) -> None:
    """Writes the checkpoint whose weights are the mean of those of `models`; config and tokenizer are the first's.

    Raises `TrainingError` for fewer than two models, for models of different shapes, and where `output` exists already.
    """
    if len(models) < 2:
        raise TrainingError("a mean is of two models at least: name another")
    if output.exists():
        raise TrainingError(f"{output} exists already, and nothing is written over: name another folder, or remove it")
    first, *others = models
    total = {name: tensor.float() for name, tensor in read_weights(first).items()}
    for other in others:
        weights = read_weights(other)
        if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in total.items()}:
            raise TrainingError(f"{other} has other weights than {first}: average runs that began from one model")
        for name, tensor in weights.items():
            total[name] += tensor.float()
    write_model(output, read_config(first), {name: tensor / len(models) for name, tensor in total.items()}, first)
