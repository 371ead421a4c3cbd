"""SwiGLU: silu(gate) * up, and the dense feed-forward block made of it (also the shared experts)."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.dropping import Again, Dropped, project
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
    """SwiGLU and down projection as one: `RecomputedSwiGLU`, and those of `model/fp8/swiglu.py`."""

    def __call__(
        self,
        gate_up: Tensor,
        down: Linear | GroupedLinear,
        row_weights: Tensor | None = None,
        counts: tuple[int, ...] | None = None,
        rowwise: Rowwise = TORCH,
    ) -> Tensor:
        """gate_up [..., 2F] and maybe a weight for each row -> [..., out]; counts: rows of each expert.

        rowwise: the caller's kernels, of the time of the call.
        """
        ...


@dataclass(frozen=True)
class RecomputedSwiGLU:
    """Keeps the SwiGLU's input as it is; its output is computed again for the down projection's weight gradient."""

    def __call__(
        self,
        gate_up: Tensor,
        down: Linear | GroupedLinear,
        row_weights: Tensor | None = None,
        counts: tuple[int, ...] | None = None,
        rowwise: Rowwise = TORCH,
    ) -> Tensor:
        """See `SwiGLUDown`."""
        hidden = swiglu(gate_up, row_weights, rowwise)
        kept, weights = gate_up.detach(), None if row_weights is None else row_weights.detach()
        again = Dropped(lambda: (swiglu(kept, weights, rowwise),)).part(0)
        return project(down, hidden, again, counts)


class MLP(nn.Module):
    """Dense SwiGLU feed-forward: down(silu(gate(x)) * up(x)), gate and up as one product."""

    rowwise: Rowwise = TORCH

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.swiglu_down: SwiGLUDown | None = None

    def forward(self, x: Tensor, x_again: Again | None = None) -> Tensor:
        """x [..., D] -> [..., D]; x_again: x for the backward, where it is not to be kept."""
        gate_up = project(self.gate_up_proj, x, x_again)
        if self.swiglu_down is not None:
            return self.swiglu_down(gate_up, self.down_proj, rowwise=self.rowwise)
        return self.down_proj(swiglu(gate_up, None, self.rowwise))
