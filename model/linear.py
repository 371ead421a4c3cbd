"""Linear layers: y = x W^T without bias. The only file that decides in which precision a product is computed.

Backward gives the input's gradient; the weight's goes through the sink (`weight_grad.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.weight_grad import Weighted, WeightGradSink, add_product


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

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
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

            def add(acc_EOI: Tensor) -> None:
                for acc, grad, x in zip(acc_EOI, grad_RO.split(counts), x_RI.split(counts), strict=True):
                    if len(x):
                        add_product(acc, grad.t(), x)

            ctx.sink.put(weight_EOI, add)
        return grad_x, None, None, None


def grouped_product(x_RI: Tensor, weight_EIO: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Rows counts[0] of x times weight[0], the next counts[1] times weight[1], ...: [R, I] x [E, I, O] -> [R, O]."""
    if x_RI.is_cuda:
        ends_E = torch.tensor(counts, device=x_RI.device).cumsum(0, dtype=torch.int32)
        return torch._grouped_mm(x_RI, weight_EIO, offs=ends_E)
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_EIO.shape[2])
    for x, weight, y in zip(x_RI.split(counts), weight_EIO, y_RO.split(counts), strict=True):
        if len(x):
            torch.mm(x, weight, out=y)
    return y_RO


class GroupedLinear(Weighted):
    """One linear layer for each expert held here; weight [num_experts, out_features, in_features]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x_RI: Tensor, counts: tuple[int, ...]) -> Tensor:
        """x_RI: rows sorted by expert, counts[e] of them for expert e -> [R, out_features]."""
        return _GroupedLinear.apply(x_RI, self.weight, counts, self.sink)  # type: ignore[return-value]
