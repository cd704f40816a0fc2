"""One group of windows on several ranks: which rank takes which windows, and the all-gather at every layer.

Every rank holds the whole model and all slots so far, and runs its own windows alone. What it lacks of the others' is
what their windows keep at that layer, keys before RoPE and values; one collective a layer brings it. Collectives
want the same size from all, so each rank sends as many slots as the rank that keeps most, to each of the others:

    bytes sent by one rank, per group = (ranks - 1) x layers x most x 2 x kv_heads x head_dim x bytes of the dtype
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from cluster.errors import MessageError


class ExchangeFailed(MessageError):
    """A rank did not take part: it died, failed, or was silent for too long. The exchange is of no more use."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One group of windows over the ranks, as one of them sees it."""

    mine: list[int]  # the group's windows that this rank takes, ascending
    most: int  # slots of the rank that keeps most
    order: Tensor  # [slots of the group] int64: where each is in what all ranks send, [ranks * most]


class Exchange:
    """A rank's end of the process group: NCCL between GPUs, gloo otherwise. To be used by one thread."""

    def __init__(self, store: Any, rank: int, ranks: int, *, host: str, device: torch.device, timeout_s: float) -> None:
        """Joins the group of `store`, once all `ranks` of it do; `host` is this rank's own address.

        Raises `ExchangeFailed` when they do not within `timeout_s`.
        """
        self.rank = rank
        self.ranks = ranks
        self.bytes_sent = 0  # to other ranks, padding included
        timeout = timedelta(seconds=timeout_s)
        try:
            if device.type == "cuda":
                options = torch.distributed.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group: Any = torch.distributed.ProcessGroupNCCL(store, rank, ranks, options)
            else:
                options = torch.distributed.ProcessGroupGloo._Options()
                options._timeout = timeout
                options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=host)]
                self._group = torch.distributed.ProcessGroupGloo(store, rank, ranks, options)
        except RuntimeError as error:
            raise ExchangeFailed(f"rank {rank} could not join the {ranks} at {host}: {error}") from error

    def spread(self, work: Sequence[float], kept: Sequence[int], device: torch.device) -> Spread:
        """Of a group whose windows take `work` of any unit and keep `kept` slots: the same on every rank."""
        shares = share_out(work, self.ranks)
        most = max(sum(kept[index] for index in share) for share in shares)
        places: dict[int, Tensor] = {}
        for rank, share in enumerate(shares):
            at = rank * most
            for index in share:
                places[index] = torch.arange(at, at + kept[index])
                at += kept[index]
        order = torch.cat([places[index] for index in range(len(kept))])
        return Spread(shares[self.rank], most, order.to(device))

    def gather(self, spread: Spread, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' `keys` and `values` [kv_heads, own slots, head_dim], in the group's order. Raises
        `ExchangeFailed`."""
        kv_heads, count, head_dim = keys.shape
        own = torch.zeros(spread.most, 2, kv_heads, head_dim, dtype=keys.dtype, device=keys.device)
        own[:count, 0], own[:count, 1] = keys.transpose(0, 1), values.transpose(0, 1)
        every = torch.empty(self.ranks * spread.most, 2, kv_heads, head_dim, dtype=keys.dtype, device=keys.device)
        try:
            self._group._allgather_base(every, own).wait()
        except RuntimeError as error:
            raise ExchangeFailed(str(error)) from error
        self.bytes_sent += (self.ranks - 1) * own.numel() * own.element_size()
        both = every[spread.order]  # [slots, 2, kv_heads, head_dim]
        return both[:, 0].transpose(0, 1), both[:, 1].transpose(0, 1)

    def close(self) -> None:
        """Ends the group at once, so that ranks that wait for this one fail and do not wait out their timeout."""
        self._group.abort()


def share_out(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of `work` by rank, each ascending: the largest first, always to the rank that has least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        rank = load.index(min(load))
        shares[rank].append(index)
        load[rank] += work[index]
    return [sorted(share) for share in shares]


def count_exchanged_bytes(most: Sequence[int], *, ranks: int, layers: int, slot_bytes: int) -> int:
    """What one rank sends for groups whose `Spread.most` are these: the formula of the module's head.

    `slot_bytes` are those of one slot in one layer, keys and values.
    """
    return (ranks - 1) * layers * slot_bytes * sum(most)


def serve_store(host: str, ranks: int, timeout_s: float) -> tuple[Any, int]:
    """The store at which ranks find one another, on a free port of `host`; it lives as long as it is referenced."""
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    store = torch.distributed.TCPStore(
        host,
        port,
        ranks,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return store, port


def reach_store(host: str, port: int, ranks: int, timeout_s: float) -> Any:
    """Another rank's `serve_store`. Raises `ExchangeFailed` if there is none within `timeout_s`."""
    try:
        return torch.distributed.TCPStore(
            host, port, ranks, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except RuntimeError as error:
        raise ExchangeFailed(f"nothing answers at {host}:{port}: {error}") from error
