"""Attention of a window to the slots before it and to itself, exact and without a mask.

A window's rows see all earlier slots and, causally, their own window. The two are computed apart, each with the
device's fused kernel, and merged by their log-sum-exp; nothing of the size [rows, slots] ever exists.
"""

import torch
from torch import Tensor

# The CPU kernel repacks the keys and values it is given: pieces bound that copy and stay in the cache.
_CPU_SLOTS_AT_ONCE = 8192
_SCORED_ROWS = 256  # of a repetition, scored together: bounds what is held of its attention


def attend(queries: Tensor, keys: Tensor, values: Tensor, slot_keys: Tensor, slot_values: Tensor, out: Tensor) -> None:
    """Attention of one window, written to `out` [rows, heads * head_dim].

    `queries` [heads, rows, head_dim] and `keys`, `values` [kv_heads, rows, head_dim] are the window's own,
    `slot_keys`, `slot_values` [kv_heads, slots, head_dim] those before it; all keys and queries are rotated.
    """
    heads, rows, head_dim = queries.shape
    kv_heads, slots = slot_keys.shape[:2]
    share = heads // kv_heads
    own_keys, own_values = (t[:, None].expand(-1, share, -1, -1).flatten(0, 1) for t in (keys, values))
    attended, lse = _attention(queries, own_keys, own_values, causal=True)
    if slots:
        # Without causality rows are interchangeable: the heads that share keys read them once, as more rows.
        folded = queries.reshape(kv_heads, share * rows, head_dim)
        step = _CPU_SLOTS_AT_ONCE if queries.device.type == "cpu" else slots
        for start in range(0, slots, step):
            piece = slice(start, start + step)
            seen, seen_lse = _attention(folded, slot_keys[:, piece], slot_values[:, piece], causal=False)
            seen = seen.unflatten(1, (share, rows)).flatten(0, 1)
            seen_lse = seen_lse.reshape(heads, rows)
            share_of_seen = torch.sigmoid(seen_lse - lse).to(seen.dtype)[..., None]
            attended = torch.lerp(attended, seen, share_of_seen)
            lse = torch.logaddexp(lse, seen_lse)
    out.view(rows, heads, head_dim).copy_(attended.transpose(0, 1))


def most_attention(queries: Tensor, first: Tensor, keys: Tensor, own: Tensor, scale: float | None = None) -> Tensor:
    """The most attention that any of `queries` pays to each of `keys`, as [kv_heads, keys] float32.

    `queries` [heads, rows, head_dim] see `first` and `keys` [kv_heads, …, head_dim], and causally `own`, the keys of
    their own rows, [kv_heads, rows, head_dim], all rotated; attention to these together is 1. `scale` is by which
    products are multiplied, 1 / sqrt(head_dim) where it is not said.
    """
    heads, rows, head_dim = queries.shape
    kv_heads, count = keys.shape[:2]
    seen = torch.cat([keys, first, own], dim=1).to(torch.float32).transpose(1, 2)
    before = seen.shape[2] - rows
    most = torch.full((kv_heads, count), -torch.inf, device=keys.device)
    for start in range(0, rows, _SCORED_ROWS):
        end = min(start + _SCORED_ROWS, rows)
        block = queries[:, start:end].to(torch.float32) * (head_dim**-0.5 if scale is None else scale)
        products = block.reshape(kv_heads, -1, head_dim) @ seen[:, :, : before + end]  # group by group of heads
        products = products.unflatten(1, (heads // kv_heads, end - start))
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=keys.device).triu_(1)
        products[..., before + start :].masked_fill_(later, -torch.inf)
        shares = products[..., :count] - products.logsumexp(dim=-1, keepdim=True)
        most = torch.maximum(most, shares.amax(dim=(1, 2)))
    return most.exp_()


def _attention(queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Outputs [heads, rows, head_dim] and natural log-sum-exp [heads, rows] float32."""
    q, k, v = queries[None], keys[None], values[None]
    rows = queries.shape[1]
    if queries.device.type == "cpu":
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif queries.dtype == torch.float32:
        result = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    else:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    # The log-sum-exp may be padded to a multiple of 32 rows.
    return result[0][0], result[1][0, :, :rows].to(torch.float32)
