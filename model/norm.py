"""RMSNorm: x / rms(x) * weight, statistics in FP32 (report section 2.1)."""

from typing import Any

import torch
from torch import Tensor, nn

from model.chunks import row_chunks
from model.weight_grad import Weighted, WeightGradSink


class _RMSNorm(torch.autograd.Function):
    """x [..., D], weight [D] -> [..., D]; saves the input and one FP32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, sink: WeightGradSink) -> Tensor:
        x_TD, y = x.flatten(0, -2), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y_TD, inverse_rms_T1 = y.view(x_TD.shape), torch.empty(len(x_TD), 1, dtype=torch.float32, device=x.device)
        for rows in row_chunks(x_TD):
            wide, inverse_rms = x_TD[rows].float(), inverse_rms_T1[rows]
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=inverse_rms)
            inverse_rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(wide * inverse_rms, weight, out=y_TD[rows])
        ctx.save_for_backward(x, weight, inverse_rms_T1)
        ctx.sink = sink
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, inverse_rms_T1 = ctx.saved_tensors
        x_TD, grad_TD = x.flatten(0, -2), grads[0].flatten(0, -2)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_x_TD, grad_weight = grad_x.view(x_TD.shape), torch.zeros_like(weight, dtype=torch.float32)
        size = x.shape[-1]
        # v g / |v| with g = sqrt(D) and the norm that eps makes larger is this norm: one pass for its gradient.
        norm_T1, gain_T1 = size**0.5 / inverse_rms_T1, torch.full_like(inverse_rms_T1, size**0.5)
        for rows in row_chunks(x_TD):
            x_rows, grad_y = x_TD[rows].float().contiguous(), grad_TD[rows].float()
            grad_x_TD[rows], _ = torch.ops.aten._weight_norm_interface_backward(
                grad_y * weight, x_rows, gain_T1[rows], norm_T1[rows], 0
            )
            if ctx.needs_input_grad[1]:
                grad_weight += grad_y.mul(x_rows).mul_(inverse_rms_T1[rows]).sum(0)
        if ctx.needs_input_grad[1]:
            ctx.sink.put(weight, lambda acc: acc.add_(grad_weight))
        return grad_x, None, None, None


class RMSNorm(Weighted):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        return _RMSNorm.apply(x, self.weight, self.eps, self.sink)  # type: ignore[return-value]
