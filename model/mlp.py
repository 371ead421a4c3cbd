"""SwiGLU: silu(gate) * up, and the dense feed-forward block made of it (also the shared experts)."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.linear import GroupedLinear, Linear
from model.rowwise.kernels import TORCH, Rowwise


class _SwiGLU(torch.autograd.Function):
    """gate_up [..., 2F] and optionally one weight a row [...] -> silu(gate) * up * weight [..., F]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None, rowwise: Rowwise) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        ctx.rowwise = rowwise
        out = rowwise.swiglu(gate_up.flatten(0, -2), None if weights is None else weights.flatten())
        return out.view(*gate_up.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        saved: tuple[Tensor, Tensor | None] = ctx.saved_tensors
        gate_up, weights = saved
        flat = None if weights is None else weights.flatten()
        gradient = ctx.rowwise.swiglu_backward(gate_up.flatten(0, -2), flat, grads[0].flatten(0, -2))
        grad_weights = (
            gradient.weights.view(weights.shape) if weights is not None and gradient.weights is not None else None
        )
        return gradient.gate_up.view(gate_up.shape), grad_weights, None


def swiglu(gate_up: Tensor, weights: Tensor | None = None, rowwise: Rowwise = TORCH) -> Tensor:
    """silu(gate) * up of gate_up [..., 2F] (gate first), each row times its entry of `weights` if given."""
    return _SwiGLU.apply(gate_up, weights, rowwise)  # type: ignore[return-value]


class SwiGLUDown(Protocol):
    """SwiGLU and down projection as one: `model/fp8/swiglu.py` has one that keeps the input in FP8 alone."""

    def __call__(
        self,
        gate_up: Tensor,
        down: Linear | GroupedLinear,
        row_weights: Tensor | None = None,
        counts: tuple[int, ...] | None = None,
    ) -> Tensor:
        """gate_up [..., 2F] and maybe a weight for each row -> [..., out]; counts: rows of each expert."""
        ...


class MLP(nn.Module):
    """Dense SwiGLU feed-forward: down(silu(gate(x)) * up(x)), gate and up as one product."""

    rowwise: Rowwise = TORCH

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.swiglu_down: SwiGLUDown | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if self.swiglu_down is not None:
            return self.swiglu_down(self.gate_up_proj(x), self.down_proj)
        return self.down_proj(swiglu(self.gate_up_proj(x), None, self.rowwise))
