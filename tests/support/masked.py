"""Transformers over a memory of which each head may see some pairs only: what pruned memories are held against."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memory_worker.models.beacon import Rope


class MaskedReference:
    """One checkpoint, in float32."""

    def __init__(self, path: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._rope = Rope.from_config(self.model.config.to_dict())
        self._seen = torch.empty(0)
        ALL_ATTENTION_FUNCTIONS.register("masked_by_head", self._attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("masked_by_head", sdpa_mask)
        self.model.set_attn_implementation("masked_by_head")

    @torch.no_grad()
    def continued(
        self, memory: Any, places: torch.Tensor, seen: torch.Tensor, position: int, asked: list[int], tokens: int
    ) -> list[int]:
        """The greedy tokens after `asked`, which stands at `position`, behind all slots of `memory` (unrotated) turned
        to `places` [slots]; `seen` [layers, kv_heads, slots] says which of them each head may see."""
        self._seen = seen
        cache = DynamicCache(config=self.model.config)
        for layer, keys in enumerate(self._rope.rotate_layers(memory.keys, places)):
            cache.update(keys[None], memory.values[layer][None], layer)
        new: list[int] = []
        fed = torch.tensor([asked])
        while len(new) < tokens:
            at = torch.arange(position, position + fed.shape[1])[None]
            logits = self.model(fed, past_key_values=cache, position_ids=at, use_cache=True, logits_to_keep=1).logits
            position += fed.shape[1]
            new.append(int(logits[0, -1].argmax()))
            fed = torch.tensor([new[-1:]])
        return new

    def _attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        rows, slots = query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        allowed = torch.ones(1, query.shape[1], rows, slots, dtype=torch.bool).tril(slots - rows)
        seen = self._seen[module.layer_idx].repeat_interleave(group, dim=0)
        allowed[0, :, :, : seen.shape[1]] &= seen[:, None]
        keys, values = (part.repeat_interleave(group, dim=1) for part in (key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=allowed, scale=scaling
        )
        return attended.transpose(1, 2).contiguous(), None
