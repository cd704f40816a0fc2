"""What turns gradients into steps: AdamW for everything, or Muon for the matrices between embedding and output.

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/) makes each step of a matrix nearly orthogonal, so
that rare directions move as far as frequent ones. On the embedded model's first stage it needs about 60 % of AdamW's
tokens (docs/training.md). Its steps are scaled to the size of AdamW's, so one learning rate serves both (arXiv
2502.16982).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from memory_worker.training.config import RunConfig
from memory_worker.training.model import TrainedModel


class Optimizer:
    """One or two of torch's optimisers as one, over the parameters that are trained."""

    def __init__(self, model: TrainedModel, run: RunConfig) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        turned: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (turned if run.optimizer == "muon" and _is_inner_matrix(name, parameter) else others).append(parameter)
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": run.weight_decay},
            {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._parts: list[torch.optim.Optimizer] = []
        if groups := [group for group in groups if group["params"]]:
            self._parts.append(torch.optim.AdamW(groups, betas=run.betas, fused=True))
        if turned:
            muon = torch.optim.Muon(turned, weight_decay=run.weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)

    def step(self, learning_rate: float) -> None:
        """One step of all parameters along their gradients, which are dropped."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Its tensors by `<parameter>/<moment>`, whole and on the CPU. With sharded parameters, every rank calls."""
        return {
            f"{self._names[parameter]}/{moment}": gather_whole(tensor)
            for part in self._parts
            for parameter, held in part.state.items()
            for moment, tensor in held.items()
        }

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Takes what `moments` gave."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = {name: parameter for parameter, name in self._names.items()}
        states = {p: part.state[p] for part in self._parts for group in part.param_groups for p in group["params"]}
        for key, tensor in moments.items():
            name, _, moment = key.rpartition("/")
            parameter = parameters[name]
            if isinstance(parameter, DTensor) and tensor.ndim:
                tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
            states[parameter][moment] = tensor.clone() if moment == "step" else tensor.to(parameter.device)


def _is_inner_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name


def gather_whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over ranks, as a copy on the CPU."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().clone()
