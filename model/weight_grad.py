"""The seam between a layer's backward and its weight gradient.

Every layer with weights computes only the gradient of its input in backward and hands a closure for the weight's
gradient to its sink. The default sink runs the closure at once; the pipeline's sink keeps it for a later W action
(zero bubble, report section 3.2.1). Gradients accumulate in FP32 in `weight.main_grad`, the attribute that
Transformer Engine and Megatron use for the same purpose, whatever the weight's own dtype.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

AddGrad = Callable[[Tensor], None]


class WeightGradSink(Protocol):
    """Takes one micro-batch's contribution to one weight's gradient."""

    def put(self, weight: Tensor, add: AddGrad) -> None:
        """Arrange that `add(acc)` is called once, with acc the FP32 accumulator of `weight` (same shape)."""
        ...


def main_grad(weight: Tensor) -> Tensor:
    """FP32 accumulator of `weight`, created as zeros on first use."""
    acc = getattr(weight, "main_grad", None)
    if acc is None:
        acc = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        weight.main_grad = acc  # type: ignore[attr-defined]
    return acc


class ImmediateSink:
    """Adds every contribution at once: the plain backward."""

    def put(self, weight: Tensor, add: AddGrad) -> None:
        """Run `add` on the accumulator now."""
        if weight.requires_grad:
            add(main_grad(weight))


class Weighted(nn.Module):
    """A module whose weights' gradients go through a sink."""

    def __init__(self) -> None:
        super().__init__()
        self.sink: WeightGradSink = ImmediateSink()


def set_sink(module: nn.Module, sink: WeightGradSink) -> None:
    """Send the weight gradients of `module` and all below it to `sink`."""
    for child in module.modules():
        if isinstance(child, Weighted):
            child.sink = sink


def add_product(acc: Tensor, left: Tensor, right: Tensor) -> None:
    """acc += left @ right with acc in FP32; operands FP32 or BF16 (whose product is rounded to BF16 on a CPU)."""
    if left.dtype == torch.float32:
        acc.addmm_(left, right)
    elif acc.is_cuda:
        torch.addmm(acc, left, right, out_dtype=torch.float32, out=acc)
    else:
        acc.add_(left @ right)
