"""Memory models of any family that transformers and vLLM both know, for the kinds of memory that need no beacons.

`BeaconModel` computes the families that beacons are trained for; `StockModel` lets transformers compute all others, and
takes from its cache what a memory is made of. A cache has keys turned to their positions, a slot has them unturned: so
how a checkpoint turns keys must be known (`beacon.rope`), and is tested on every checkpoint that is loaded.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_worker.models.beacon import BeaconModel, Part, Repetition, Rope, Slots, UnsupportedCheckpoint
from memory_worker.models.beacon.attention import most_attention
from memory_worker.models.beacon.checkpoint import DEFAULT_WINDOW, families, fingerprint, read_config, resolve
from memory_worker.models.beacon.model import SINKS
from memory_worker.models.beacon.windows import token_ids

_PROBE_TOKENS = 24
_PROBE_SHIFT = 4096  # positions: even slow dimensions of a head turn visibly over so many
# Mean error of a key's dimensions, relative to each. Turned wrongly, some are off by 1 and more; half precision alone
# makes up to a few hundredths, which grow with the layers before.
_EXACT, _HALF_FIRST_LAYER, _HALF = 0.02, 0.1, 0.3
_WATCHED_SDPA = "memorag_watched_sdpa"  # the name under which transformers finds `_attend_watched`
# Gets each layer's rotated queries [1, heads, rows, head_dim] and keys [1, kv_heads, slots, head_dim], and their scale.
_watch: ContextVar[Callable[[int, Tensor, Tensor, float | None], None]] = ContextVar("watch")


@dataclass(frozen=True)
class StockModel:
    """A decoder without beacon weights, run by transformers. Made by `from_pretrained`; calls change nothing in it.

    What it has in common with `BeaconModel` means the same there.
    """

    folder: Path
    rope: Rope = field(repr=False)
    layers: int
    kv_heads: int
    head_dim: int
    _model: Any = field(repr=False)

    has_beacons = False
    window = DEFAULT_WINDOW
    group_windows = 4  # so many gists are written at a time; reading, each window is a pass of its own

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "StockModel":
        """Loads a checkpoint from a folder or the hub, and tests on it that its slots are what slots must be.

        No code of a checkpoint is run. Raises `UnsupportedCheckpoint` or `UnsupportedRope`.
        """
        folder = resolve(path)
        model = _load(folder, dtype).to(device).eval()
        config = model.config.get_text_config()
        try:
            rope = Rope.from_config(config.to_dict()).to(device)
        except KeyError as error:
            raise _unfit(folder, f"its config has no {error}, and how it rotates keys is not known") from error
        shapes = _cache_shapes(folder, model)
        if len(shapes) != 1:
            raise _unfit(folder, f"keys and values are not of one shape in all layers: {sorted(shapes)}")
        kv_heads, head_dim = shapes.pop()
        stock = cls(folder, rope, config.num_hidden_layers, kv_heads, head_dim, model)
        stock._check()
        return stock

    @property
    def dtype(self) -> torch.dtype:
        return next(self._model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder)

    def ratios_that_divide(self) -> tuple[int, ...]:
        """None: it compresses nothing."""
        return ()

    def compress_documents(
        self,
        documents: Sequence[Sequence[int] | Tensor],
        *,
        ratio: int | None,
        memory: Slots | Sequence[Slots | None] | None = None,
        group_windows: int | None = None,
    ) -> Iterator[tuple[Part, ...]]:
        """As `BeaconModel.compress_documents`, without `ratio` alone.

        Windows are read one after another; a group only says after how many of them parts are yielded.
        """
        if ratio is not None:
            raise UnsupportedCheckpoint(f"{self.folder} has no beacon weights: it cannot compress what it reads")
        memories = [memory] * len(documents) if memory is None or isinstance(memory, Slots) else memory
        windows = self._windows(documents, memories)
        while group := [*islice(windows, group_windows or self.group_windows)]:
            yield tuple(_join([*parts]) for _, parts in groupby(group, key=lambda part: part.document))

    @torch.no_grad()
    def read_scored(
        self, tokens: Sequence[int] | Tensor, *, memory: Slots, repetitions: Sequence[Repetition]
    ) -> tuple[Slots, Tensor]:
        """As `BeaconModel.read_scored`. Raises `UnsupportedCheckpoint` where `can_score` is false."""
        cache = self._cache(memory)
        ids = token_ids(tokens, self._model.get_input_embeddings().num_embeddings)
        slots = Slots.concat([self._read(window, cache) for window in ids.split(self.window)])
        scores = torch.zeros(self.layers, self.kv_heads, len(ids), device=self.device)
        end = len(memory) + len(ids)
        for repetition in repetitions:
            watched: set[int] = set()

            def watch(
                layer: int,
                queries: Tensor,
                keys: Tensor,
                scale: float | None,
                watched: set[int] = watched,
                repeated: Repetition = repetition,
            ) -> None:
                watched.add(layer)
                first = keys[0, :, : min(SINKS, len(memory))]
                stretch = keys[0, :, len(memory) + repeated.start : len(memory) + repeated.end]
                most = most_attention(queries[0], first, stretch, keys[0, :, end:], scale)
                scores[layer, :, repeated.start : repeated.end] = most

            self._read_watched(repetition.tokens, cache, watch)
            cache.crop(end)
            if watched != {*range(self.layers)}:
                raise _unfit(self.folder, "transformers does not show what its layers attend to")
        return slots, scores

    @cached_property
    def can_score(self) -> bool:
        """Whether `read_scored` works: transformers shows what the layers of most families attend to, not of all."""
        probe = torch.zeros(2, dtype=torch.int64)
        (head,) = self.compress_documents([probe], ratio=None)
        try:
            self.read_scored(probe, memory=head[0].slots, repetitions=[Repetition(0, 2, probe)])
        except (UnsupportedCheckpoint, ValueError):
            return False
        return True

    @torch.no_grad()
    def generate_each(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """The likeliest tokens after each prompt, one by one, in all prompts at a time.

        A prompt ends at the first of `stop`, which is left out, or after `max_new_tokens`.
        """
        from transformers import GenerationConfig

        if not prompts:
            return []
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]  # on the left, so that all go on at the same place
        tokens = [[0] * count + [*prompt] for count, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * count + [1] * (longest - count) for count in padding]
        written = self._model.generate(
            input_ids=torch.tensor(tokens, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop) or None, pad_token_id=0
            ),
        )
        return [_until(row, stop) for row in written[:, longest:].tolist()]

    def _windows(self, documents: Sequence[Sequence[int] | Tensor], memories: Sequence[Slots | None]) -> Iterator[Part]:
        """The parts of all documents, a window each."""
        vocabulary = self._model.get_input_embeddings().num_embeddings
        for number, (tokens, before) in enumerate(zip(documents, memories, strict=True)):
            ids = token_ids(tokens, vocabulary)
            cache = self._cache(before)
            for start in range(0, len(ids), self.window):
                window = ids[start : start + self.window]
                yield Part(number, len(window), self._read(window, cache), start + len(window) == len(ids))

    @torch.no_grad()
    def _read(self, ids: Tensor, cache: Any, shift: int = 0) -> Slots:
        """The slots of `ids` [tokens], which follow those in `cache` and go there too; positions begin at `shift`."""
        first = cache.get_seq_length()
        places = torch.arange(first, first + len(ids), device=self.device) + shift
        self._model.base_model(
            input_ids=ids[None].to(self.device), position_ids=places[None], past_key_values=cache, use_cache=True
        )
        turned = torch.stack([layer.keys[0, :, first:] for layer in cache.layers])
        values = torch.stack([layer.values[0, :, first:] for layer in cache.layers])
        slots = Slots(self.rope.rotate_layers(turned, places, back=True), values)
        # Later windows see keys as they are stored, rounded as often: so a job that goes on makes the same bytes.
        for layer, keys in zip(cache.layers, self.rope.rotate_layers(slots.keys, places), strict=True):
            layer.keys[0, :, first:] = keys
        return slots

    def _read_watched(
        self, ids: Tensor, cache: Any, watch: Callable[[int, Tensor, Tensor, float | None], None]
    ) -> None:
        """Reads `ids` [tokens] behind `cache`, to which they are added, with `watch` at every layer's attention.

        Raises `ValueError` where transformers has another attention for the model than that of torch.
        """
        used = self._model.config._attn_implementation
        if used != "sdpa":
            raise ValueError(f"{self.folder} is read with {used!r} attention, which nothing can watch")
        places = torch.arange(len(ids), device=self.device) + cache.get_seq_length()
        _register_watched_sdpa()
        self._model.set_attn_implementation(_WATCHED_SDPA)
        token = _watch.set(watch)
        try:
            self._model.base_model(
                input_ids=ids[None].to(self.device), position_ids=places[None], past_key_values=cache, use_cache=True
            )
        finally:
            _watch.reset(token)
            self._model.set_attn_implementation(used)

    def _cache(self, memory: Slots | None) -> Any:
        """A cache of transformers that holds `memory`, turned to its slots."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        if memory is None:
            return cache
        memory.expect(self.layers, self.kv_heads, self.head_dim)
        slots = memory.to(self.device, self.dtype)
        turned = self.rope.rotate_layers(slots.keys, torch.arange(len(slots)))
        for layer in range(self.layers):
            cache.update(turned[layer][None], slots.values[layer][None], layer)
        return cache

    def _check(self) -> None:
        """Raises `UnsupportedCheckpoint` unless slots depend neither on where the text begins nor on where it is cut.

        The first holds only where RoPE, as it is known here, is all that says where a token is: with it a text's
        unturned keys, and values, are the same at any positions, in every layer.
        """
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or _PROBE_SHIFT
        vocabulary = self._model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0))
        try:
            whole = self._read(ids, self._cache(None))
            shifted = self._read(ids, self._cache(None), max(1, min(_PROBE_SHIFT, limit - _PROBE_TOKENS)))
            half = self._read(ids[: _PROBE_TOKENS // 2], self._cache(None))
            cut = Slots.concat([half, self._read(ids[_PROBE_TOKENS // 2 :], self._cache(half))])
        except Exception as error:
            raise _unfit(self.folder, f"transformers cannot read on from a memory ({error})") from error
        if not self._agree(whole, shifted):
            raise _unfit(self.folder, "its keys and values depend on positions in another way than by the RoPE known")
        if not self._agree(whole, cut):
            raise _unfit(self.folder, "what it reads depends on more of what came before than keys and values")

    def _agree(self, one: Slots, other: Slots) -> bool:
        exact = self.dtype == torch.float32
        for a, b in ((one.keys, other.keys), (one.values, other.values)):
            size = a.float().square().mean(dim=2).sqrt().clamp_min(1e-20)  # [layers, kv_heads, head_dim]
            error = ((a.float() - b.float()).square().mean(dim=2).sqrt() / size).mean(dim=(1, 2))  # [layers]
            allowed = torch.full_like(error, _EXACT if exact else _HALF)
            allowed[0] = _EXACT if exact else _HALF_FIRST_LAYER
            if not bool((error <= allowed).all()):
                return False
        return True


MemoryModel = BeaconModel | StockModel


def load_memory_model(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> MemoryModel:
    """A checkpoint from a folder or the hub. Raises `UnsupportedCheckpoint` or `UnsupportedRope`."""
    folder = resolve(path)
    known = families(read_config(folder))
    return (BeaconModel if known else StockModel).from_pretrained(folder, dtype=dtype, device=device)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """The model of transformers, with every weight that it has from the checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
    from transformers.cache_utils import DynamicLayer

    read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers = DynamicCache(config=config).layers
        if {type(layer) for layer in layers} != {DynamicLayer}:
            raise _unfit(folder, "its layers do not all attend to all that is before, and it would forget its memory")
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except UnsupportedCheckpoint:
        raise
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise _unfit(folder, f"transformers does not load it without running code of its own ({error})") from error
    if absent := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise UnsupportedCheckpoint(f"{folder} lacks the weight {absent[0]}, or has it in another shape")
    model.generation_config = GenerationConfig()  # gists are greedy, whatever the checkpoint suggests
    return model


@torch.no_grad()
def _cache_shapes(folder: Path, model: Any) -> set[tuple[int, int]]:
    """KV heads and head dimensions of keys and of values, in all layers."""
    try:
        cache = model.base_model(input_ids=torch.tensor([[0]], device=model.device), use_cache=True).past_key_values
        return {(part.shape[1], part.shape[3]) for layer in cache.layers for part in (layer.keys, layer.values)}
    except Exception as error:
        raise _unfit(folder, f"transformers keeps no keys and values of what it reads ({error})") from error


def _join(parts: list[Part]) -> Part:
    """Consecutive parts of a document as one."""
    slots = parts[0].slots if len(parts) == 1 else Slots.concat([part.slots for part in parts])
    return Part(parts[0].document, sum(part.tokens for part in parts), slots, parts[-1].last)


def _register_watched_sdpa() -> None:
    """Makes `_attend_watched` known to transformers, with the masks of the attention that it wraps."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_WATCHED_SDPA, _attend_watched)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_WATCHED_SDPA, sdpa_mask)


def _attend_watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _watch.get()(module.layer_idx, query, key, others.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, mask, **others)


def _until(tokens: list[int], stop: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


def _unfit(folder: Path, reason: str) -> UnsupportedCheckpoint:
    kind = read_config(folder).get("model_type")
    return UnsupportedCheckpoint(
        f"{folder} holds a model of type {kind!r} that cannot make memories: {reason}; use a decoder with full "
        "attention in all layers and RoPE, such as Qwen2, Qwen3, Llama, Phi-3, Gemma, GLM or OLMo 2 (docs/kinds.md)"
    )
