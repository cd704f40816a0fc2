"""Rates that nobody measured: what data sheets promise, times a share that is assumed to be reached.

`memorag plan` counts with them for those who do not have the machines yet. Language models write as fast as memory
brings their weights and their KV cache; all that is read goes as fast as matrices are multiplied.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import Field

from cluster.config import Settings
from cluster.planning.costs import GIST_WINDOW, MemoryKind, ModelShape, PlanError, slots_of, window_flops, window_of

_HERE: Final = Path(__file__).parent
CORE: Final = "core"  # what stands for one CPU core where a pool has no GPU


class Processor(Settings):
    """Peaks of one GPU, or of one CPU core."""

    accelerator_type: str | None = Field(None, description="Ray's name for it")
    bf16_tflops: float = Field(gt=0, description="dense bfloat16 products, 10^12 FLOP/s")
    memory_gb: float = Field(0.0, ge=0, description="10^9 bytes")
    memory_gb_per_s: float = Field(gt=0, description="what it reads from its memory, 10^9 bytes/s")
    link_gb_per_s: float = Field(gt=0, description="what it receives from the others of its node, 10^9 bytes/s")
    source: str

    def times(self, count: float) -> "Processor":
        """So many of them, or a share of one, that work as one."""
        peaks = ("bf16_tflops", "memory_gb", "memory_gb_per_s")
        return self.model_copy(update={name: getattr(self, name) * count for name in peaks})


class Assumptions(Settings):
    """What is reached of the peaks, and what a question is taken to be."""

    memorize_share: float = Field(0.4, description="of the FLOP/s, while texts are memorized")
    prompt_share: float = Field(0.4, description="of the FLOP/s, while prompts are read")
    embed_share: float = Field(0.3, description="of the FLOP/s, while passages are embedded")
    write_share: float = Field(0.6, description="of the memory's bandwidth, while clues, answers or gists are written")
    step_s: float = Field(0.004, description="seconds of each step of an engine beside its arithmetic")
    requests_in_flight: int = Field(32, description="sequences that one engine writes together")
    clue_tokens_share: float = Field(0.5, description="of memory.recall.max_clue_tokens, written for each kind of clue")
    clue_kinds: int = Field(3, description="kinds of clues recalled for a question")
    clues: int = Field(8, description="clues of a question that are searched, of all kinds")
    instruction_tokens: int = Field(200, description="tokens of a question and its instruction")
    answer_tokens: int = Field(200, description="tokens of an answer, and not more than generator.max_answer_tokens")
    characters_per_token: float = Field(4.0, description="of a text, by the memory model's tokenizer")
    passage_share: float = Field(0.85, description="of retrieval.passages.max_characters, filled by a passage")
    head_slots: int = Field(64, description="slots of the instruction before every memory")
    recall_core_s: float = Field(0.01, description="CPU seconds of a Recaller for one question")
    search_core_s: float = Field(0.02, description="CPU seconds of a Retriever for one question")
    generate_core_s: float = Field(0.0001, description="CPU seconds of a Generator for one token")
    route_core_s: float = Field(0.02, description="CPU seconds of Router and Ingress for one question")


@dataclass(frozen=True, slots=True)
class Engine:
    """A language model, and all that one replica has to run it on."""

    shape: ModelShape
    processor: Processor


def known_gpus() -> dict[str, Processor]:
    """GPUs by the names that `memorag plan --gpu` takes."""
    return {name: gpu for name, gpu in _processors().items() if name != CORE}


def find_gpu(name: str) -> Processor:
    """The GPU of that name, or of that accelerator type of Ray. Raises `PlanError` that names the nearest."""
    gpus = known_gpus()
    for known, gpu in gpus.items():
        if name.lower() in (known, (gpu.accelerator_type or known).lower()):
            return gpu
    close = [known for known in gpus if known.startswith(name.lower())]
    close = close or difflib.get_close_matches(name.lower(), gpus, n=1, cutoff=0.5)
    nearest = f", did you mean {' or '.join(close)}?" if close else ""
    raise PlanError(f"no data sheet of a GPU {name!r}{nearest}: give one of {', '.join(gpus)}, or measured --rates")


def cpu_core() -> Processor:
    return _processors()[CORE]


@functools.cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """What config.json has of models by their names."""
    return yaml.safe_load((_HERE / "models.yaml").read_text(encoding="utf-8"))


@functools.cache
def _processors() -> dict[str, Processor]:
    rows = yaml.safe_load((_HERE / "gpus.yaml").read_text(encoding="utf-8"))
    return {name: Processor.model_validate(row) for name, row in rows.items()}


def estimate_writing(engine: Engine, assumed: Assumptions, *, tokens: float, prompt: float, context: float) -> float:
    """Tokens a second that an engine writes, over all of its requests.

    Each request has `prompt` tokens read for it, and is `tokens` long with `context` slots in the cache meanwhile.
    """
    shape, requests = engine.shape, assumed.requests_in_flight
    read_s = requests * 2.0 * shape.matrix_parameters * prompt / (_flops(engine.processor) * assumed.prompt_share)
    return requests * tokens / (read_s + tokens * _step_s(engine, assumed, requests, context))


def estimate_memorize_flops(
    engine: Engine, assumed: Assumptions, kind: MemoryKind, ratio: int, group_windows: int
) -> float:
    """Counted FLOP/s of one rank. Gists are written token by token, a group of windows at a time."""
    reached = _flops(engine.processor) * assumed.memorize_share
    if kind != "gist":
        return reached
    written = slots_of(GIST_WINDOW, ratio)
    work = group_windows * window_flops(engine.shape, window_of(engine.shape, kind), ratio, 0, kind)
    return work / (work / reached + written * _step_s(engine, assumed, group_windows, GIST_WINDOW))


def estimate_embedding(shape: ModelShape, processor: Processor, assumed: Assumptions, tokens: float) -> float:
    """Texts of so many tokens that an Embedder embeds a second. An encoder's MLP has two matrices, not three."""
    parameters = shape.matrix_parameters - shape.layers * shape.hidden * shape.mlp
    return _flops(processor) * assumed.embed_share / (2.0 * parameters * tokens)


def _step_s(engine: Engine, assumed: Assumptions, requests: int, context: float) -> float:
    """One token of each request: all weights and every request's cache are read, or as many products take longer."""
    shape, processor = engine.shape, engine.processor
    read = shape.weight_bytes + requests * context * shape.slot_bytes
    read_s = read / (processor.memory_gb_per_s * 1e9 * assumed.write_share)
    return assumed.step_s + max(
        read_s, 2.0 * requests * shape.matrix_parameters / (_flops(processor) * assumed.prompt_share)
    )


def _flops(processor: Processor) -> float:
    return processor.bf16_tflops * 1e12
