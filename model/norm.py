"""RMSNorm: x / rms(x) * weight, statistics in FP32 (report section 2.1)."""

from typing import Any

import torch
from torch import Tensor, nn

from model.rowwise.kernels import TORCH, Rowwise
from model.weight_grad import Weighted, WeightGradSink


class _RMSNorm(torch.autograd.Function):
    """x [..., D], weight [D] -> [..., D]; saves the input and one FP32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, sink: WeightGradSink, rowwise: Rowwise) -> Tensor:
        normed = rowwise.rms_norm(x.flatten(0, -2), weight, eps)
        ctx.save_for_backward(x, weight, normed.inverse_rms)
        ctx.sink, ctx.rowwise = sink, rowwise
        return normed.y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        gradient = ctx.rowwise.rms_norm_backward(x.flatten(0, -2), weight, inverse_rms, grads[0].flatten(0, -2))
        if ctx.needs_input_grad[1]:
            grad_weight = gradient.weight  # alone: what is put off must not hold the other one
            ctx.sink.put(weight, lambda acc: acc.add_(grad_weight))
        return gradient.x.view(x.shape), None, None, None, None


class RMSNorm(Weighted):
    """Root-mean-square norm over the last dimension."""

    rowwise: Rowwise = TORCH

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        return _RMSNorm.apply(x, self.weight, self.eps, self.sink, self.rowwise)  # type: ignore[return-value]
