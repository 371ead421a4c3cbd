"""Expert all-to-all in its plainest form: one row for every (token, expert), one `all_to_all_single` each way.

The reference for faster back ends: what arrives, its order within an expert (by source rank, then token) and the sum
per token (in the order of k) are defined here.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch import Dispatched, Permutation, permute, unpermute


@dataclass(frozen=True)
class _Handle:
    """Where rows went, to send results and gradients back the same way.

    sent, received: rows to and from each rank of the group. regroup: permutation from arrival order (by source rank,
    then local expert) to expert order; back: its inverse.
    """

    permutation: Permutation
    sent: list[int]
    received: list[int]
    regroup: Tensor
    back: Tensor


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


class _Forth(torch.autograd.Function):
    """Rows in the sender's expert order -> rows in the receiver's expert order; backward is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: _Handle, group: dist.ProcessGroup) -> Tensor:
        ctx.handle, ctx.group = handle, group
        return _exchange(rows, handle.sent, handle.received, group)[handle.regroup]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        handle = ctx.handle
        return _exchange(grads[0][handle.back], handle.received, handle.sent, ctx.group), None, None


class _Back(torch.autograd.Function):
    """The inverse of `_Forth`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: _Handle, group: dist.ProcessGroup) -> Tensor:
        ctx.handle, ctx.group = handle, group
        return _exchange(rows[handle.back], handle.received, handle.sent, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        handle = ctx.handle
        return _exchange(grads[0], handle.sent, handle.received, ctx.group)[handle.regroup], None, None


class FlatDispatcher:
    """`TokenDispatcher` over a process group whose rank i holds the experts [i * E / n, (i + 1) * E / n)."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self._group, self._num_ranks = group, dist.get_world_size(group)
        self._num_experts, self._num_local = num_experts, num_experts // self._num_ranks

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """See `TokenDispatcher`."""
        permutation = Permutation.by_expert(ids_TK)
        to_RE = torch.bincount(ids_TK.flatten(), minlength=self._num_experts).view(self._num_ranks, self._num_local)
        from_RE = torch.empty_like(to_RE)
        dist.all_to_all_single(from_RE, to_RE, group=self._group)
        # One copy to the host for all counts: the splits of an all-to-all are host integers.
        counts = torch.stack([to_RE, from_RE]).cpu()
        sent, received = counts.sum(2).tolist()
        arrival_expert = torch.arange(self._num_local).repeat(self._num_ranks).repeat_interleave(counts[1].flatten())
        regroup = arrival_expert.argsort(stable=True).to(x_TD.device)
        back = torch.empty_like(regroup)
        back[regroup] = torch.arange(len(regroup), device=regroup.device)
        handle = _Handle(permutation, sent, received, regroup, back)
        rows_RD = _Forth.apply(permute(x_TD, permutation), handle, self._group)
        weights_R = _Forth.apply(weights_TK.flatten()[permutation.order_R], handle, self._group)
        return Dispatched(rows_RD, weights_R, tuple(counts[1].sum(0).tolist()), handle)  # type: ignore[arg-type]

    def combine(self, rows_RD: Tensor, handle: _Handle) -> Tensor:
        """See `TokenDispatcher`."""
        returned = _Back.apply(rows_RD, handle, self._group)
        return unpermute(returned, handle.permutation)  # type: ignore[arg-type]
