"""What the row-wise passes compute, in plain torch: the definition, and what runs where nothing else is configured.

Their compiled form for a CPU is `native.py`. Statistics and sums are FP32 in both; compiled, all that lies between
reading and writing a row is.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.chunks import row_chunks


@dataclass(frozen=True)
class Normed:
    """y [R, D] as x, and 1 / rms of each row, FP32 [R, 1]."""

    y: Tensor
    inverse_rms: Tensor


@dataclass(frozen=True)
class NormGradient:
    """Gradients of x [R, D] and of the weight, FP32 [D]."""

    x: Tensor
    weight: Tensor


@dataclass(frozen=True)
class SwiGLUGradient:
    """Gradients of gate_up [R, 2F] and of the rows' weights [R], if there are any."""

    gate_up: Tensor
    weights: Tensor | None


class Rowwise(Protocol):
    """Passes over rows, without autograd: all tensors [R, ...] dense."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Normed:
        """x [R, D] / rms of its row * weight [D]."""
        ...

    def rms_norm_backward(self, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad: Tensor) -> NormGradient:
        """grad [R, D] of y; inverse_rms as `rms_norm` gave it."""
        ...

    def swiglu(self, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        """silu(gate) * up of gate_up [R, 2F], gate first, each row times its weight if given: [R, F]."""
        ...

    def swiglu_backward(self, gate_up: Tensor, weights: Tensor | None, grad: Tensor) -> SwiGLUGradient:
        """grad [R, F] of what `swiglu` gave."""
        ...

    def causal_softmax(self, scores: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        """Softmax over the first `first` + i + 1 scores of row i, 0 after them: [heads, rows, size] in `dtype`.

        scores: FP32 [heads, rows, size], size at least first + rows; overwritten.
        """
        ...

    def causal_softmax_backward(self, p: Tensor, grad: Tensor, first: int) -> Tensor:
        """Gradient of the scores from that of p, [heads, rows, size] both; may be grad's own memory."""
        ...

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """FP32 loss [N] in nats of labels [N], 0 where negative; logits [N, V] become softmax minus one-hot, or 0."""
        ...


class TorchRowwise:
    """`Rowwise` in torch, on any device; on a CPU in chunks whose temporaries stay in cache."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Normed:
        """See `Rowwise`."""
        y, inverse_rms_R1 = torch.empty_like(x), torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
        for rows in row_chunks(x):
            wide, inverse_rms = x[rows].float(), inverse_rms_R1[rows]
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=inverse_rms)
            inverse_rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(wide * inverse_rms, weight, out=y[rows])
        return Normed(y, inverse_rms_R1)

    def rms_norm_backward(self, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad: Tensor) -> NormGradient:
        """See `Rowwise`."""
        grad_x, grad_weight, size = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32), x.shape[-1]
        # v g / |v| with g = sqrt(D) and the norm that eps makes larger is this norm: one pass for its gradient.
        norm, gain = size**0.5 / inverse_rms, torch.full_like(inverse_rms, size**0.5)
        for rows in row_chunks(x):
            x_rows, grad_y = x[rows].float().contiguous(), grad[rows].float()
            grad_x[rows], _ = torch.ops.aten._weight_norm_interface_backward(
                grad_y * weight, x_rows, gain[rows], norm[rows], 0
            )
            grad_weight += grad_y.mul(x_rows).mul_(inverse_rms[rows]).sum(0)
        return NormGradient(grad_x, grad_weight)

    def swiglu(self, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        """See `Rowwise`."""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        for rows in row_chunks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=out[rows])
            if weights is not None:
                out[rows].mul_(weights[rows].unsqueeze(-1))
        return out

    def swiglu_backward(self, gate_up: Tensor, weights: Tensor | None, grad: Tensor) -> SwiGLUGradient:
        """See `Rowwise`."""
        grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        grad_weights = None if weights is None else torch.empty_like(weights)
        for rows in row_chunks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            grad_gate, grad_up = grad_gate_up[rows].chunk(2, dim=-1)
            grad_out, activated = grad[rows], F.silu(gate)
            if weights is not None and grad_weights is not None:
                grad_weights[rows] = torch.linalg.vecdot(grad_out.float(), (activated * up).float())
                grad_out = grad_out * weights[rows].unsqueeze(-1).to(grad_out.dtype)
            torch.mul(grad_out, activated, out=grad_up)
            grad_gate.copy_(torch.ops.aten.silu_backward(activated.copy_(grad_out).mul_(up), gate))
        return SwiGLUGradient(grad_gate_up, grad_weights)

    def causal_softmax(self, scores: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        """See `Rowwise`."""
        num = scores.shape[1]
        scores[..., first:] += scores.new_full((num, scores.shape[2] - first), float("-inf")).triu_(1)
        return torch.softmax(scores, dim=-1).to(dtype)

    def causal_softmax_backward(self, p: Tensor, grad: Tensor, first: int) -> Tensor:
        """See `Rowwise`."""
        return torch.ops.aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=grad)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Rowwise`; in FP32 temporaries of the size of the logits: the caller cuts."""
        index, ignored, wide = labels.clamp(min=0).unsqueeze(1), (labels < 0).unsqueeze(1), logits.float()
        largest, where = wide.max(dim=-1, keepdim=True)
        p = torch.softmax(wide, dim=-1)
        # log-sum-exp from the largest entry, whose probability is at least 1/V: no second pass, no underflow.
        loss = largest - p.gather(1, where).log_() - wide.gather(1, index)
        p.scatter_add_(1, index, p.new_full(index.shape, -1.0))
        if ignored.any():
            p.masked_fill_(ignored, 0)
        logits.copy_(p)
        return loss.masked_fill_(ignored, 0).squeeze(1)


TORCH = TorchRowwise()
