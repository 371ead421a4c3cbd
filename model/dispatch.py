"""The seam between a layer's tokens and its experts: the dispatcher protocol, and its form within one process.

`dispatch` copies every token to each of its experts and sorts the copies by expert; `combine` sums the results per
token. The back ends across processes are in `parallel/expert/`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dispatched:
    """What arrived: rows_RD sorted by local expert, counts[e] of them for local expert e, and each row's weight.

    weights_R: router weight of the row, FP32. handle: what `combine` needs to send the results back.
    """

    rows_RD: Tensor
    weights_R: Tensor
    counts: tuple[int, ...]
    handle: Any


class TokenDispatcher(Protocol):
    """Carries tokens to experts and back; both directions differentiable, no token ever dropped."""

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Tokens x_TD with global expert ids and weights -> the rows for the experts held here."""
        ...

    def combine(self, rows_RD: Tensor, handle: Any) -> Tensor:
        """The experts' (weighted) outputs -> for each token the sum over its experts: [T, D]."""
        ...


@dataclass(frozen=True)
class Permutation:
    """Sorting of T*K token copies by expert.

    order_R: copy index t * K + k of each row; inverse_TK: row index of each copy; top_k: K.
    """

    order_R: Tensor
    inverse_TK: Tensor
    top_k: int

    @staticmethod
    def by_expert(ids_TK: Tensor) -> "Permutation":
        """Stable sort of the copies by expert id, so that rows of one expert keep the tokens' order."""
        order_R = ids_TK.flatten().argsort(stable=True)
        inverse = torch.empty_like(order_R)
        inverse[order_R] = torch.arange(len(order_R), device=order_R.device)
        return Permutation(order_R, inverse.view_as(ids_TK), ids_TK.shape[1])


def gather_rows(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Each row its token's vector: x_TD -> [R, D]."""
    return x_TD.index_select(0, permutation.order_R // permutation.top_k)


def sum_rows(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """For each token the sum of its K rows, in the order of k: rows_RD -> [T, D]."""
    if rows_RD.is_cuda or rows_RD.dtype == torch.float64:
        return rows_RD[permutation.inverse_TK].sum(1)
    return F.embedding_bag(permutation.inverse_TK, rows_RD, mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return gather_rows(x_TD, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grads[0].contiguous(), ctx.permutation), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return sum_rows(rows_RD, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grads[0], ctx.permutation), None


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Differentiable `gather_rows`."""
    return _Permute.apply(x_TD, permutation)  # type: ignore[return-value]


def unpermute(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Differentiable `sum_rows`, the transpose of `permute`."""
    return _Unpermute.apply(rows_RD, permutation)  # type: ignore[return-value]


class LocalDispatcher:
    """All experts in this process: sorting and summing only."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """See `TokenDispatcher`."""
        permutation = Permutation.by_expert(ids_TK)
        counts = torch.bincount(ids_TK.flatten(), minlength=self.num_experts)
        weights_R = weights_TK.flatten()[permutation.order_R]
        return Dispatched(permute(x_TD, permutation), weights_R, tuple(counts.tolist()), permutation)

    def combine(self, rows_RD: Tensor, handle: Permutation) -> Tensor:
        """See `TokenDispatcher`."""
        return unpermute(rows_RD, handle)
