"""Expert all-to-all in its plainest form: one row for every (token, expert), one `all_to_all_single` each way.

The reference for faster back ends: what arrives, its order within an expert (by source rank, then token) and the sum
per token (in the order of k) are defined here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch import (
    Combined,
    Dispatched,
    Permutation,
    gather_rows,
    gather_scalars,
    return_scalars,
    sum_rows,
)
from parallel.expert.exchange import ExpertGroup, Given
from parallel.expert.transfer import Begun, Hop, Parcel, Traffic, Transfer
from parallel.expert.wire import as_bytes, from_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class _Handle:
    """Where rows went, to send results and gradients back the same way.

    sent, received: rows to and from each rank of the group. regroup: permutation from arrival order (by source rank,
    then local expert) to expert order; back: its inverse. weights_R: weights that arrived with the first dispatch.
    """

    permutation: Permutation
    sent: list[int]
    received: list[int]
    regroup: Tensor
    back: Tensor
    counts: tuple[int, ...]
    weights_R: Tensor | None = None


class FlatDispatcher:
    """`TokenDispatcher` over a process group whose rank i holds the experts [i * E / n, (i + 1) * E / n)."""

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, *, timeout: timedelta = timedelta(minutes=5)
    ) -> None:
        self._experts = ExpertGroup(group, num_experts=num_experts, wire=0, timeout=timeout)
        self._num_ranks = len(self._experts.ranks)
        self._num_local = num_experts // self._num_ranks
        self._hop = Hop("all ranks", group, self._experts.ranks, self._experts.me)

    @property
    def traffic(self) -> Traffic:
        """Rows and bytes sent to other ranks so far."""
        return self._hop.traffic

    def dispatch(
        self,
        x_TD: Tensor,
        ids_TK: Tensor | None = None,
        weights_TK: Tensor | None = None,
        *,
        handle: _Handle | None = None,
    ) -> Transfer[Dispatched]:
        """See `TokenDispatcher`."""
        if handle is not None:
            known, weights_R = handle, handle.weights_R
            assert weights_R is not None, "the handle is of a dispatch that has not been waited for"
            return self._transfer(
                "dispatch with a handle",
                Parcel(gather_rows(x_TD, known.permutation)),
                (known.sent, known.received),
                lambda arrived: Dispatched(arrived.rows_ND[known.regroup], weights_R, known.counts, known),
            )
        if ids_TK is None or weights_TK is None:
            raise ValueError("a first dispatch needs ids_TK and weights_TK")
        new = self._route(x_TD, ids_TK, weights_TK)

        def finish(arrived: Parcel) -> Dispatched:
            assert arrived.extra_NB is not None
            weights_R = from_bytes(arrived.extra_NB, weights_TK.dtype)[new.regroup, 0]
            kept = _Handle(new.permutation, new.sent, new.received, new.regroup, new.back, new.counts, weights_R)
            return Dispatched(arrived.rows_ND[new.regroup], weights_R, new.counts, kept)

        weights_R1 = gather_scalars(weights_TK, new.permutation)[:, None]
        parcel = Parcel(gather_rows(x_TD, new.permutation), as_bytes(weights_R1))
        return self._transfer(f"dispatch {self._experts.number}", parcel, (new.sent, new.received), finish)

    def combine(self, rows_RD: Tensor, handle: _Handle, weights_R: Tensor | None = None) -> Transfer[Combined]:
        """See `TokenDispatcher`."""
        extra = None if weights_R is None else as_bytes(weights_R[handle.back, None])

        def finish(arrived: Parcel) -> Combined:
            weights_TK = None
            if weights_R is not None and arrived.extra_NB is not None:
                scalars = from_bytes(arrived.extra_NB, weights_R.dtype)[:, 0]
                weights_TK = return_scalars(scalars, handle.permutation)
            return Combined(sum_rows(arrived.rows_ND, handle.permutation), weights_TK)

        return self._transfer("combine", Parcel(rows_RD[handle.back], extra), (handle.received, handle.sent), finish)

    def _transfer(
        self, name: str, parcel: Parcel, splits: tuple[list[int], list[int]], finish: Callable[[Parcel], T]
    ) -> Transfer[T]:
        sent = self._hop.start(parcel, *splits)
        return Transfer(name, Begun(sent), self._hop, finish, self._experts.roll_call)

    def _route(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> _Handle:
        given = Given(x_TD, x_TD.dtype, ids_TK, weights_TK)
        exchanged = self._experts.exchange(given, width=self._num_local, table=self._counts)
        permutation = Permutation.by_expert(ids_TK, self._experts.num_experts)
        from_RE = exchanged.from_RC
        arrival_expert = torch.arange(self._num_local).repeat(self._num_ranks).repeat_interleave(from_RE.flatten())
        regroup = arrival_expert.argsort(stable=True).to(ids_TK.device)
        back = torch.empty_like(regroup)
        back[regroup] = torch.arange(len(regroup), device=regroup.device)
        sent, received = exchanged.own_RC.sum(1).tolist(), from_RE.sum(1).tolist()
        return _Handle(permutation, sent, received, regroup, back, tuple(from_RE.sum(0).tolist()))

    def _counts(self, ids_TK: Tensor) -> Tensor:
        """Rows for each expert: [R, local experts]."""
        ids = ids_TK.flatten().long() + 1
        ones = torch.ones_like(ids)
        counts = ones.new_zeros(self._experts.num_experts + 1).scatter_add_(0, ids, ones)
        return counts[1:].view(self._num_ranks, self._num_local)
