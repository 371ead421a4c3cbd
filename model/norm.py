"""RMSNorm: x / rms(x) * weight, statistics in FP32 (report section 2.1)."""

from typing import Any

import torch
from torch import Tensor, nn

from model.weight_grad import Weighted, WeightGradSink


class _RMSNorm(torch.autograd.Function):
    """x [..., D], weight [D] -> [..., D]; saves the input and one FP32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, sink: WeightGradSink) -> Tensor:
        wide = x.float()
        inverse_rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse_rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.sink = sink
        return (wide * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad_y = grads[0].float()
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.float() * inverse_rms
        grad_normed = grad_y * weight
        if ctx.needs_input_grad[1]:
            grad_weight = torch.linalg.vecdot(grad_y.flatten(0, -2), normed.flatten(0, -2), dim=0)
            ctx.sink.put(weight, lambda acc: acc.add_(grad_weight))
        projection = torch.linalg.vecdot(grad_normed, normed).unsqueeze(-1).div_(x.shape[-1])
        grad_x = grad_normed.sub_(normed.mul_(projection)).mul_(inverse_rms)
        return grad_x.to(x.dtype), None, None, None


class RMSNorm(Weighted):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        return _RMSNorm.apply(x, self.weight, self.eps, self.sink)  # type: ignore[return-value]
