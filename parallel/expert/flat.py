"""Expert all-to-all in its plainest form: one row for every (token, expert), one `all_to_all_single` each way.

The reference for faster back ends: what arrives, its order within an expert (by source rank, then token) and the sum
per token (in the order of k) are defined here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

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

T = TypeVar("T")


@dataclass(frozen=True)
class Transfer(Generic[T]):
    """Collectives under way, and what to make of their outputs when they have arrived."""

    works: tuple[dist.Work, ...]
    finish: Callable[[], T]

    def wait(self) -> T:
        """See `Pending`."""
        for work in self.works:
            work.wait()
        return self.finish()

    def done(self) -> bool:
        """See `Pending`."""
        return all(work.is_completed() for work in self.works)


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

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self._group, self._num_ranks = group, dist.get_world_size(group)
        self._num_experts, self._num_local = num_experts, num_experts // self._num_ranks

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
            known = handle
            rows, work = self._start(gather_rows(x_TD, known.permutation), known.sent, known.received)
            assert known.weights_R is not None, "the handle is of a dispatch that has not been waited for"
            weights_R = known.weights_R
            return Transfer((work,), lambda: Dispatched(rows[known.regroup], weights_R, known.counts, known))
        assert ids_TK is not None and weights_TK is not None, "a first dispatch needs ids and weights"
        new = self._route(ids_TK)
        rows, rows_work = self._start(gather_rows(x_TD, new.permutation), new.sent, new.received)
        weights, weights_work = self._start(gather_scalars(weights_TK, new.permutation), new.sent, new.received)

        def finish() -> Dispatched:
            weights_R = weights[new.regroup]
            kept = _Handle(new.permutation, new.sent, new.received, new.regroup, new.back, new.counts, weights_R)
            return Dispatched(rows[new.regroup], weights_R, new.counts, kept)

        return Transfer((rows_work, weights_work), finish)

    def combine(self, rows_RD: Tensor, handle: _Handle, weights_R: Tensor | None = None) -> Transfer[Combined]:
        """See `TokenDispatcher`."""
        rows, rows_work = self._start(rows_RD[handle.back], handle.received, handle.sent)
        if weights_R is None:
            return Transfer((rows_work,), lambda: Combined(sum_rows(rows, handle.permutation), None))
        weights, weights_work = self._start(weights_R[handle.back], handle.received, handle.sent)
        return Transfer(
            (rows_work, weights_work),
            lambda: Combined(sum_rows(rows, handle.permutation), return_scalars(weights, handle.permutation)),
        )

    def _start(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, dist.Work]:
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(arrived, rows, received, sent, group=self._group, async_op=True)
        assert work is not None
        return arrived, work

    def _route(self, ids_TK: Tensor) -> _Handle:
        permutation = Permutation.by_expert(ids_TK, self._num_experts)
        to_RE = torch.tensor(permutation.counts, device=ids_TK.device).view(self._num_ranks, self._num_local)
        from_RE = torch.empty_like(to_RE)
        dist.all_to_all_single(from_RE, to_RE, group=self._group)
        from_RE = from_RE.cpu()  # the splits of an all-to-all are host integers
        sent = [sum(permutation.counts[start : start + self._num_local]) for start in self._starts()]
        received = from_RE.sum(1).tolist()
        arrival_expert = torch.arange(self._num_local).repeat(self._num_ranks).repeat_interleave(from_RE.flatten())
        regroup = arrival_expert.argsort(stable=True).to(ids_TK.device)
        back = torch.empty_like(regroup)
        back[regroup] = torch.arange(len(regroup), device=regroup.device)
        return _Handle(permutation, sent, received, regroup, back, tuple(from_RE.sum(0).tolist()))

    def _starts(self) -> range:
        return range(0, self._num_experts, self._num_local)
