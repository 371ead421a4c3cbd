"""Linear layers: y = x W^T without bias. The only file that decides in which precision a product is computed.

Backward gives the input's gradient; the weight's goes through the sink (`weight_grad.py`).
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.weight_grad import Weighted, WeightGradSink, add_product


class FP8Call(Protocol):
    """A product in FP8 in place of the wide one: `model/fp8` has the implementations, `apply_fp8` sets them."""

    def __call__(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None = None
    ) -> Tensor:
        """x [..., in], weight [out, in] or [groups, out, in] with counts rows each -> [..., out]."""
        ...


class _Linear(torch.autograd.Function):
    """x [..., I], weight [O, I] -> [..., O], computed in `dtype` where that is given, else in x's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sink: WeightGradSink, dtype: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.dtype = sink, dtype or x.dtype
        return x.to(ctx.dtype) @ weight.to(ctx.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_y,) = grads
        x, weight = ctx.saved_tensors
        grad_x = (grad_y @ weight.to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            grad_TO, x_TI, dtype = grad_y.flatten(0, -2), x.flatten(0, -2), ctx.dtype
            ctx.sink.put(weight, lambda acc: add_product(acc, grad_TO.t(), x_TI.to(dtype)))
        return grad_x, None, None, None


class Linear(Weighted):
    """y = x W^T; weight [out_features, in_features].

    dtype: computation in this dtype although weight and input are in another (the router's FP32, report 3.3.1).
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.dtype = dtype
        self.fp8: FP8Call | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.fp8 is not None:
            return self.fp8(x, self.weight, self.sink)
        return _Linear.apply(x, self.weight, self.sink, self.dtype)  # type: ignore[return-value]


class _GroupedLinear(torch.autograd.Function):
    """Rows of consecutive groups, each times its own weight: x_RI, weight_EOI, counts (E ints, sum R) -> y_RO."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts: tuple[int, ...], sink: WeightGradSink) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.counts, ctx.sink = counts, sink
        return grouped_product(x_RI, weight_EOI.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_RO,) = grads
        x_RI, weight_EOI = ctx.saved_tensors
        grad_x = grouped_product(grad_RO, weight_EOI, ctx.counts) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            counts = ctx.counts
            ctx.sink.put(weight_EOI, lambda acc_EOI: add_grouped_product(acc_EOI, grad_RO, x_RI, counts))
        return grad_x, None, None, None


def grouped_product(x_RI: Tensor, weight_EIO: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Rows counts[0] of x times weight[0], the next counts[1] times weight[1], ...: [R, I] x [E, I, O] -> [R, O]."""
    if x_RI.is_cuda:
        ends_E = torch.tensor(counts, device=x_RI.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_RI, weight_EIO, offs=ends_E)
    if x_RI.dtype == torch.bfloat16:
        return _grouped_product_in_tiles(x_RI, weight_EIO, counts)
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_EIO.shape[2])
    for x, weight, y in zip(x_RI.split(counts), weight_EIO, y_RO.split(counts), strict=True):
        if len(x):
            torch.mm(x, weight, out=y)
    return y_RO


# The CPU's BF16 product compiles a kernel for every new shape, 1.5 ms each, ten times a product of 512 rows. Experts'
# row counts are new in every step, so they are rounded up to a multiple of this and shapes recur.
TILE_ROWS = 64


def _tiled(count: int) -> int:
    return -(-count // TILE_ROWS) * TILE_ROWS


def _grouped_product_in_tiles(x_RI: Tensor, weight_EIO: Tensor, counts: tuple[int, ...]) -> Tensor:
    """As grouped_product: each expert also multiplies some of the next one's rows, which that one then overwrites."""
    num_rows, start = len(x_RI), 0
    y_RO = x_RI.new_empty(num_rows + TILE_ROWS, weight_EIO.shape[2])
    for count, weight in zip(counts, weight_EIO, strict=True):
        if count:
            window = slice(start, start + _tiled(count))
            torch.mm(_padded(x_RI, window), weight, out=y_RO[window])
            start += count
    return y_RO[:num_rows]


def _padded(rows: Tensor, window: slice) -> Tensor:
    """rows[window], with zeros for what lies beyond their end."""
    part = rows[window]
    missing = window.stop - window.start - len(part)
    return F.pad(part, (0, 0, 0, missing)) if missing else part


def add_grouped_product(acc_EOI: Tensor, grad_RO: Tensor, x_RI: Tensor, counts: tuple[int, ...]) -> None:
    """acc[e] += grad^T x over the rows of expert e, accumulators in FP32."""
    start = 0
    for acc, count in zip(acc_EOI, counts, strict=True):
        if not count:
            continue
        grad, x = grad_RO[start : start + count], x_RI[start : start + count]
        if x.dtype == torch.bfloat16 and not x.is_cuda:
            grad, x = _padded(grad, slice(0, _tiled(count))), _padded(x, slice(0, _tiled(count)))
        add_product(acc, grad.t(), x)
        start += count


class GroupedLinear(Weighted):
    """One linear layer for each expert held here; weight [num_experts, out_features, in_features]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.fp8: FP8Call | None = None

    def forward(self, x_RI: Tensor, counts: tuple[int, ...]) -> Tensor:
        """x_RI: rows sorted by expert, counts[e] of them for expert e -> [R, out_features]."""
        if self.fp8 is not None:
            return self.fp8(x_RI, self.weight, self.sink, counts)
        return _GroupedLinear.apply(x_RI, self.weight, counts, self.sink)  # type: ignore[return-value]
