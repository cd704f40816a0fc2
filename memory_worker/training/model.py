"""The beacon memory model with gradients: all windows of many texts, and the questions after them, in one pass.

The computation is that of `BeaconModel` (a test compares them); this one is differentiable, batched, and its
parameters carry the checkpoint's names. The recurrence over windows runs over layers: a window's queries see, at
each layer, the slots of earlier windows' beacons at that layer, which the same pass has just made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memory_worker.models.beacon.rope import Rope, rotate_by
from memory_worker.training.config import TrainingError
from memory_worker.training.layout import Layout

BEACON_MARK = "beacon_"  # in the names of the weights that beacons have and stock decoders do not


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of one layout with what follows them. Weights say how much a token counts as a target; 0 is not at all."""

    layout: Layout
    text: Tensor  # [texts, tokens] int64
    text_weights: Tensor  # [texts, tokens] float32; of predicting this token from those before it in its window
    tails: Tensor  # [texts, tails, tail_tokens] int64
    tail_weights: Tensor  # [texts, tails, tail_tokens] float32

    @property
    def token_count(self) -> int:
        """Tokens that go through the model, beacons not counted."""
        return self.text.numel() + self.tails.numel()

    @property
    def weight(self) -> Tensor:
        """Of all targets together, as `forward` counts them."""
        starts = [window.start for window in self.layout.windows]
        first = self.text_weights[:, starts].sum() + self.tail_weights[:, :, :1].sum()
        return self.text_weights.sum() + self.tail_weights.sum() - first

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""
        moved = (t.to(device) for t in (self.text, self.text_weights, self.tails, self.tail_weights))
        return Batch(self.layout, *moved)


class TrainedModel(nn.Module):
    """A Qwen2, Qwen3, Mistral or Llama decoder in training. `config` is the checkpoint's config.json.

    Without `beacons` it has none of their weights, and reads texts raw.
    """

    def __init__(self, config: dict[str, Any], *, beacons: bool = True) -> None:
        super().__init__()
        self.config = config
        self.has_beacons = beacons
        self.rope = Rope.from_config(config)
        self.checkpoint_layers = False
        hidden = config["hidden_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        if beacons:
            self.model.beacon_embed_tokens = nn.Embedding(1, hidden)
        self.model.layers = nn.ModuleList(_Layer(config, beacons) for _ in range(config["num_hidden_layers"]))
        self.model.norm = _Norm(hidden, config.get("rms_norm_eps", 1e-6))
        if not config.get("tie_word_embeddings", False):
            self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over weighted targets: loss in nats, weights, and weights of those predicted right."""
        hidden = self.hidden(batch)
        layout = batch.layout
        texts = len(hidden)
        sizes = [layout.tokens, layout.tails * layout.tail_tokens, layout.beacons]
        of_text, of_tails, _ = hidden.split(sizes, 1)
        tails = of_tails.unflatten(1, (layout.tails, layout.tail_tokens))
        picked = [(tails[:, :, :-1], batch.tails[:, :, 1:], batch.tail_weights[:, :, 1:])]
        for window in layout.windows:
            inside, before = slice(window.start + 1, window.end), slice(window.start, window.end - 1)
            picked.append((of_text[:, before], batch.text[:, inside], batch.text_weights[:, inside]))
        losses, weights, hits = [], [], []
        for rows, targets, weight in picked:
            chosen = weight.reshape(texts, -1) > 0
            if not bool(chosen.any()):
                continue
            logits = self.read(rows.reshape(texts, -1, rows.shape[-1])[chosen]).float()
            right, counted = targets.reshape(texts, -1)[chosen], weight.reshape(texts, -1)[chosen]
            losses.append((F.cross_entropy(logits, right, reduction="none") * counted).sum())
            weights.append(counted.sum())
            hits.append((counted * (logits.detach().argmax(-1) == right)).sum())
        if not losses:
            raise TrainingError("no token of this batch is a target: give its texts or its answers a weight above 0")
        return torch.stack(losses).sum(), torch.stack(weights).sum(), torch.stack(hits).sum()

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [texts, rows, hidden], in the layout's order of rows, before the last norm."""
        layout = batch.layout
        if layout.beacons and not self.has_beacons:
            raise TrainingError(
                "this model has no beacons to compress a text with: set ratios: [0], or data's raw: true"
            )
        texts = len(batch.text)
        ids = torch.cat([batch.text, batch.tails.flatten(1)], dim=1)
        parts = [self.model.embed_tokens(ids)]
        if layout.beacons:
            parts.append(self.model.beacon_embed_tokens.weight.expand(texts, layout.beacons, -1))
        hidden = torch.cat(parts, dim=1)
        tables = _tables(self.rope, layout, hidden.device)
        for layer in self.model.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, layout, tables, use_reentrant=False)
            else:
                hidden = layer(hidden, layout, tables)
        return hidden

    def read(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of last hidden states [..., hidden]."""
        head = self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight
        return F.linear(self.model.norm(hidden), head)


class _Layer(nn.Module):
    """One decoder layer; its modules are named as in a checkpoint."""

    def __init__(self, config: dict[str, Any], beacons: bool) -> None:
        super().__init__()
        hidden, epsilon = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
        self.input_layernorm = _Norm(hidden, epsilon)
        self.self_attn = _Attention(config, beacons)
        self.post_attention_layernorm = _Norm(hidden, epsilon)
        self.mlp = nn.Module()
        bias = config.get("mlp_bias", False)
        self.mlp.gate_proj = nn.Linear(hidden, config["intermediate_size"], bias=bias)
        self.mlp.up_proj = nn.Linear(hidden, config["intermediate_size"], bias=bias)
        self.mlp.down_proj = nn.Linear(config["intermediate_size"], hidden, bias=bias)

    def forward(self, hidden: Tensor, layout: Layout, tables: tuple[Tensor, ...]) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), layout, tables)
        normed = self.post_attention_layernorm(hidden)
        return hidden + self.mlp.down_proj(F.silu(self.mlp.gate_proj(normed)) * self.mlp.up_proj(normed))


class _Attention(nn.Module):
    """Attention of windows to earlier slots and to themselves, and of tails to the whole memory and to themselves."""

    def __init__(self, config: dict[str, Any], beacons: bool) -> None:
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or hidden // self.heads
        bias = config.get("attention_bias", config["model_type"] == "qwen2")
        for prefix in ("", BEACON_MARK) if beacons else ("",):
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                self.add_module(f"{prefix}{name}_proj", nn.Linear(hidden, heads * self.head_dim, bias=bias))
        out_bias = config.get("attention_bias", False) and config["model_type"] != "qwen2"
        if config["model_type"] == "qwen3":
            self.q_norm, self.k_norm = (_Norm(self.head_dim, config.get("rms_norm_eps", 1e-6)) for _ in "qk")
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=out_bias)

    def forward(self, normed: Tensor, layout: Layout, tables: tuple[Tensor, ...]) -> Tensor:
        stock = layout.stock_rows
        rows = self._project(normed[:, :stock], "")
        if layout.beacons:
            rows = torch.cat([rows, self._project(normed[:, stock:], BEACON_MARK)], dim=1)
        if rows.device.type == "cpu":
            rows = rows.float()  # its attention kernel is twenty times slower in bfloat16
        apart = rows.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # [texts, heads + 2 kv_heads, rows, head_dim]
        raw, values = apart.split([self.heads + self.kv_heads, self.kv_heads], 1)
        raw_queries, raw_keys = raw.split([self.heads, self.kv_heads], 1)
        if hasattr(self, "q_norm"):
            raw_keys = self.k_norm(raw_keys)
            raw = torch.cat([self.q_norm(raw_queries), raw_keys], 1)
        queries, keys = _Turned.apply(raw, tables[0], tables[1]).split([self.heads, self.kv_heads], 1)
        kept = layout.kept.to(normed.device)
        memory = (
            _Turned.apply(raw_keys.index_select(2, kept), tables[2], tables[3]),
            values.index_select(2, kept),
        )
        # Cut once: the gradient of many slices would be as many tensors of the whole's size.
        tokens = [window.end - window.start for window in layout.windows]
        beacons = [window.beacons for window in layout.windows]
        sizes = [*tokens, layout.tails * layout.tail_tokens, *beacons]
        cut = [whole.split(sizes, 2) for whole in (queries, keys, values)]
        slots = [whole.split([window.kept for window in layout.windows], 2) for whole in memory] if tokens else [(), ()]

        attended: list[Tensor] = []
        of_beacons: list[Tensor] = []
        for index, window in enumerate(layout.windows):
            own = [torch.cat([pieces[index], pieces[len(tokens) + 1 + index]], 2) for pieces in cut]
            before = [torch.cat(pieces[:index], 2) if index else None for pieces in slots]
            out = self._attend(own, before, layout.mask(window).to(normed.device))
            of_tokens, of_own_beacons = out.split([tokens[index], beacons[index]], 2)
            attended.append(of_tokens)
            of_beacons.append(of_own_beacons)
        if layout.tails:
            attended.append(self._attend_tails([pieces[len(tokens)] for pieces in cut], memory, layout))
        return self.o_proj(torch.cat([*attended, *of_beacons], dim=2).transpose(1, 2).flatten(2))

    def _project(self, normed: Tensor, prefix: str) -> Tensor:
        """Queries, keys and values side by side, [texts, rows, (heads + 2 kv_heads) * head_dim]."""
        parts = [getattr(self, f"{prefix}{name}_proj") for name in "qkv"]
        if type(parts[0]) is not nn.Linear:  # adapters add to what each gives
            return torch.cat([part(normed) for part in parts], -1)
        weight = torch.cat([part.weight for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return F.linear(normed, weight, bias)

    def _attend_tails(self, own: Sequence[Tensor], memory: Sequence[Tensor], layout: Layout) -> Tensor:
        """All tails [texts, heads, tails * tail_tokens, head_dim], each over its text's slots and itself.

        Rows of all tails meet the slots in one product, so that nothing of the memory is copied for a tail.
        """
        shared = self.heads // self.kv_heads
        each = (layout.tails, layout.tail_tokens)
        queries, keys, values = (rows.unflatten(2, each) for rows in own)
        queries = queries.unflatten(1, (self.kv_heads, shared)) * self.head_dim**-0.5
        keys, values = keys[:, :, None], values[:, :, None]
        rows = queries.flatten(2, 4)  # [texts, kv_heads, shared * tails * tail_tokens, head_dim]
        later = torch.ones(layout.tail_tokens, layout.tail_tokens, dtype=torch.bool, device=rows.device).triu(1)
        with torch.autocast(rows.device.type, enabled=False):
            of_itself = (queries @ keys.transpose(-1, -2)).masked_fill(later, -torch.inf)
            of_slots = (rows @ memory[0].transpose(-1, -2)).view(*of_itself.shape[:-1], layout.slots)
            shares = torch.cat([of_slots, of_itself], -1).softmax(-1)
            at_slots, at_itself = shares.split([layout.slots, layout.tail_tokens], -1)
            attended = (at_slots.flatten(2, 4) @ memory[1]).view_as(queries) + at_itself @ values
        return attended.flatten(1, 2).flatten(2, 3)

    def _attend(self, own: list[Tensor], slots: list[Tensor | None], mask: Tensor) -> Tensor:
        """[texts, heads, rows, head_dim] of `own` queries, keys, values, after the keys and values of `slots`."""
        queries, keys, values = own
        if slots[0] is not None and slots[1] is not None:
            keys, values = torch.cat([slots[0], keys], 2), torch.cat([slots[1], values], 2)
        grouped = self.heads != self.kv_heads
        with torch.autocast(queries.device.type, enabled=False):
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)


class _Norm(nn.Module):
    def __init__(self, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.epsilon)


def _tables(rope: Rope, layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
    """Cosines and sines [rows, head_dim / 2] in place, then [slots, head_dim / 2] at the slots."""
    at_slot = torch.arange(layout.slots)
    return tuple(table.to(device) for positions in (layout.positions, at_slot) for table in rope.table(positions))


class _Turned(torch.autograd.Function):
    """Rows [..., rows, head_dim] turned by tables [rows, head_dim / 2]; the gradient is turned back."""

    @staticmethod
    def forward(context: Any, rows: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        context.save_for_backward(cosines, sines)
        return rotate_by(rows, cosines, sines)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = context.saved_tensors
        return rotate_by(gradient, cosines, -sines), None, None
