"""The routed experts held by this process: grouped SwiGLU over rows sorted by expert."""

from torch import Tensor, nn

from model.linear import GroupedLinear
from model.mlp import SwiGLUDown, swiglu
from model.rowwise.kernels import TORCH, Rowwise


class Experts(nn.Module):
    """down(silu(gate(x)) * up(x) * weight) for each row with its own expert.

    The router's weight multiplies the narrow activation instead of the output: the same product, F numbers a row
    instead of D, and what leaves for combine only has to be summed.
    """

    rowwise: Rowwise = TORCH

    def __init__(self, hidden_size: int, intermediate_size: int, expert_ids: range) -> None:
        super().__init__()
        self.expert_ids = expert_ids  # global ids of the experts held here
        self.gate_up_proj = GroupedLinear(len(expert_ids), hidden_size, 2 * intermediate_size)
        self.down_proj = GroupedLinear(len(expert_ids), intermediate_size, hidden_size)
        self.swiglu_down: SwiGLUDown | None = None

    def forward(self, rows_RD: Tensor, weights_R: Tensor, counts: tuple[int, ...]) -> Tensor:
        """rows_RD sorted by expert, counts[e] rows each, with router weights -> weighted outputs [R, D]."""
        if self.swiglu_down is not None:
            gate_up = self.gate_up_proj(rows_RD, counts)
            return self.swiglu_down(gate_up, self.down_proj, weights_R, counts, self.rowwise)
        return self.down_proj(swiglu(self.gate_up_proj(rows_RD, counts), weights_R, self.rowwise), counts)
