"""The seam between a layer's tokens and its experts: the dispatcher protocol, and its form within one process.

A dispatcher only moves rows: `dispatch` copies every token to each of its experts and sorts the copies by expert,
`combine` sums them per token. Each is the transpose of the other, so the backward of one is the other along the same
routing; `dispatch_tokens` and `combine_rows` are that rule as autograd. Both primitives return at once with a
`Pending`, so a pipeline may compute while rows travel. The back ends across processes are in `parallel/expert/`.
"""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A transfer under way."""

    def wait(self) -> T_co:
        """Its result; on a GPU the current stream waits, not the host. Call once."""
        ...

    def done(self) -> bool:
        """Whether `wait` would return without waiting."""
        ...


@dataclass(frozen=True)
class Ready(Generic[T]):
    """A transfer that was over when it began."""

    value: T

    def wait(self) -> T:
        """See `Pending`."""
        return self.value

    def done(self) -> bool:
        """See `Pending`."""
        return True


@dataclass(frozen=True)
class Dispatched:
    """What arrived: rows_RD sorted by local expert, counts[e] of them for local expert e, and each row's weight.

    weights_R: router weight of the row, FP32. handle: the routing, for `combine` and for every later transfer along it.
    """

    rows_RD: Tensor
    weights_R: Tensor
    counts: tuple[int, ...]
    handle: Any


@dataclass(frozen=True)
class Combined:
    """What came back: for each token the sum over its copies, and, if sent, each copy's own scalar (FP32)."""

    sum_TD: Tensor
    weights_TK: Tensor | None


class TokenDispatcher(Protocol):
    """Carries tokens to experts and back; no autograd, no token ever dropped.

    Ids are global expert numbers, -1 for a slot that is not used (a token may have none at all).
    """

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor | None = None, weights_TK: Tensor | None = None, *, handle: Any = None
    ) -> Pending[Dispatched]:
        """Tokens x_TD to their experts: by ids and weights, or by the handle of an earlier dispatch (weights again)."""
        ...

    def combine(self, rows_RD: Tensor, handle: Any, weights_R: Tensor | None = None) -> Pending[Combined]:
        """Rows back to their tokens, summed per token; weights_R: a scalar of each row, back to its (token, k)."""
        ...


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, dispatcher: TokenDispatcher, out: list[Dispatched]
    ) -> tuple[Tensor, Tensor]:
        arrived = dispatcher.dispatch(x_TD, ids_TK, weights_TK).wait()
        out.append(arrived)
        ctx.dispatcher, ctx.handle = dispatcher, arrived.handle
        return arrived.rows_RD, arrived.weights_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        back = ctx.dispatcher.combine(grads[0], ctx.handle, grads[1]).wait()
        return back.sum_TD, back.weights_TK, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, dispatcher: TokenDispatcher, handle: Any) -> Tensor:
        ctx.dispatcher, ctx.handle = dispatcher, handle
        return dispatcher.combine(rows_RD, handle).wait().sum_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dispatcher.dispatch(grads[0], handle=ctx.handle).wait().rows_RD, None, None


def dispatch_tokens(dispatcher: TokenDispatcher, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
    """`dispatch`, waited for and differentiable in x and weights."""
    out: list[Dispatched] = []
    rows_RD, weights_R = _Dispatch.apply(x_TD, weights_TK, ids_TK, dispatcher, out)  # type: ignore[misc]
    return Dispatched(rows_RD, weights_R, out[0].counts, out[0].handle)


def combine_rows(dispatcher: TokenDispatcher, rows_RD: Tensor, handle: Any) -> Tensor:
    """`combine`, waited for and differentiable in the rows: [T, D]."""
    return _Combine.apply(rows_RD, dispatcher, handle)  # type: ignore[return-value]


@dataclass(frozen=True)
class Permutation:
    """Sorting of the used ones of T*K token copies by expert.

    order_R: copy index t * K + k of each row; inverse_TK: row index of each copy, R for an unused one; counts: rows of
    each expert.
    """

    order_R: Tensor
    inverse_TK: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def by_expert(ids_TK: Tensor, num_experts: int) -> "Permutation":
        """Stable sort of the copies by expert id, so that rows of one expert keep the tokens' order."""
        ids = ids_TK.flatten()
        unused, *counts = torch.bincount(ids + 1, minlength=num_experts + 1).tolist()
        if len(counts) > num_experts:
            raise ValueError(f"expert id {len(counts) - 1} is out of range: there are {num_experts} experts")
        order_R = ids.argsort(stable=True)[unused:]
        inverse = torch.full_like(ids, len(order_R)) if unused else torch.empty_like(ids)
        inverse[order_R] = torch.arange(len(order_R), device=ids.device)
        return Permutation(order_R, inverse.view_as(ids_TK), tuple(counts))

    @property
    def all_used(self) -> bool:
        """Whether every copy has a row."""
        return len(self.order_R) == self.inverse_TK.numel()


def gather_rows(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Each row its token's vector: x_TD -> [R, D]."""
    return x_TD.index_select(0, permutation.order_R // permutation.inverse_TK.shape[1])


def sum_rows(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """For each token the sum of its K rows, in the order of k: rows_RD -> [T, D]."""
    if not permutation.all_used:
        rows_RD = F.pad(rows_RD, (0, 0, 0, 1))
    if rows_RD.is_cuda or rows_RD.dtype == torch.float64:
        return rows_RD[permutation.inverse_TK].sum(1)
    return F.embedding_bag(permutation.inverse_TK, rows_RD, mode="sum")


def gather_scalars(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Each row its copy's scalar: weights_TK -> [R]."""
    return weights_TK.flatten()[permutation.order_R]


def return_scalars(weights_R: Tensor, permutation: Permutation) -> Tensor:
    """Each copy its row's scalar, zero where it has none: weights_R -> [T, K]."""
    if not permutation.all_used:
        weights_R = F.pad(weights_R, (0, 1))
    return weights_R[permutation.inverse_TK]


@dataclass(frozen=True)
class _LocalHandle:
    permutation: Permutation
    weights_R: Tensor


class LocalDispatcher:
    """All experts in this process: sorting and summing only."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self,
        x_TD: Tensor,
        ids_TK: Tensor | None = None,
        weights_TK: Tensor | None = None,
        *,
        handle: _LocalHandle | None = None,
    ) -> Ready[Dispatched]:
        """See `TokenDispatcher`."""
        if handle is None:
            assert ids_TK is not None and weights_TK is not None, "a first dispatch needs ids and weights"
            permutation = Permutation.by_expert(ids_TK, self.num_experts)
            handle = _LocalHandle(permutation, gather_scalars(weights_TK, permutation))
        rows_RD = gather_rows(x_TD, handle.permutation)
        return Ready(Dispatched(rows_RD, handle.weights_R, handle.permutation.counts, handle))

    def combine(self, rows_RD: Tensor, handle: _LocalHandle, weights_R: Tensor | None = None) -> Ready[Combined]:
        """See `TokenDispatcher`."""
        weights_TK = None if weights_R is None else return_scalars(weights_R, handle.permutation)
        return Ready(Combined(sum_rows(rows_RD.contiguous(), handle.permutation), weights_TK))
