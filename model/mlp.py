"""SwiGLU: silu(gate) * up, and the dense feed-forward block made of it (also the shared experts)."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chunks import row_chunks
from model.linear import GroupedLinear, Linear


class _SwiGLU(torch.autograd.Function):
    """gate_up [..., 2F] and optionally one weight a row [...] -> silu(gate) * up * weight [..., F]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        gate_up_RF, out_RF = gate_up.flatten(0, -2), out.flatten(0, -2)
        for rows in row_chunks(gate_up_RF):
            gate, up = gate_up_RF[rows].chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=out_RF[rows])
            if weights is not None:
                out_RF[rows].mul_(weights.flatten()[rows].unsqueeze(-1))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weights = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        grad_weights = None if weights is None else torch.empty_like(weights)
        whole_RF, gate_up_RF, grad_out_RF = (x.flatten(0, -2) for x in (grad_gate_up, gate_up, grads[0]))
        for rows in row_chunks(gate_up_RF):
            gate, up = gate_up_RF[rows].chunk(2, dim=-1)
            grad_gate, grad_up = whole_RF[rows].chunk(2, dim=-1)
            grad_out, activated = grad_out_RF[rows], F.silu(gate)
            if weights is not None and grad_weights is not None:
                grad_weights.view(-1)[rows] = torch.linalg.vecdot(grad_out.float(), (activated * up).float())
                grad_out = grad_out * weights.flatten()[rows].unsqueeze(-1).to(grad_out.dtype)
            torch.mul(grad_out, activated, out=grad_up)
            grad_gate.copy_(torch.ops.aten.silu_backward(activated.copy_(grad_out).mul_(up), gate))
        return grad_gate_up, grad_weights


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up of gate_up [..., 2F] (gate first), each row times its entry of `weights` if given."""
    return _SwiGLU.apply(gate_up, weights)  # type: ignore[return-value]


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

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.swiglu_down: SwiGLUDown | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if self.swiglu_down is not None:
            return self.swiglu_down(self.gate_up_proj(x), self.down_proj)
        return self.down_proj(swiglu(self.gate_up_proj(x)))
