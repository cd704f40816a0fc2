"""What a decoder layer does to rows of hidden states, attention apart. Computed for `BeaconModel`, in place."""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from memory_worker.models.beacon.checkpoint import Layer

# Rows that go through the MLP together: bounds its activations; fewer rows a product run slower. Measured on two CPU
# cores with benchmarks/memorize.py.
_MLP_ROWS = {"cpu": 4096, "cuda": 8192}


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Of the last dimension of `hidden` [..., size], computed in float32; `weight` [size]."""
    rows = hidden.to(torch.float32)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return (rows * torch.rsqrt(norm.square_().div_(hidden.shape[-1]).add_(epsilon))).to(hidden.dtype).mul_(weight)


def add_linear(hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Adds `weight` times `rows`, and the bias, to `hidden` [rows, hidden] in place."""
    hidden.addmm_(rows, weight.t())
    if bias is not None:
        hidden += bias


def add_mlp(hidden: Tensor, layer: Layer, epsilon: float) -> None:
    """Adds the layer's MLP to `hidden` [rows, hidden] in place."""
    for piece in hidden.split(_MLP_ROWS.get(hidden.device.type, 8192)):
        normed = rms_norm(piece, layer.mlp_norm, epsilon)
        gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        add_linear(piece, silu(gate).mul_(up), layer.down, layer.down_bias)
