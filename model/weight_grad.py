"""The seam between a layer's backward and its weight gradient.

Every layer with weights computes only the gradient of its input in backward and hands a closure for the weight's
gradient to its sink. The default sink runs the closure at once; the pipeline's sink keeps it for a later W action
(zero bubble, report section 3.2.1). Gradients accumulate in FP32 in `weight.main_grad`, the attribute that
Transformer Engine and Megatron use for the same purpose, whatever the weight's own dtype.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

AddGrad = Callable[[Tensor], object]


@runtime_checkable
class Overwriting(Protocol):
    """A contribution that can also take the place of what the accumulator held, at less than zeroing and adding."""

    def __call__(self, acc: Tensor) -> None:
        """acc += the gradient."""
        ...

    def write(self, acc: Tensor) -> None:
        """acc = the gradient, every element of it."""
        ...


class WeightGradSink(Protocol):
    """Takes one micro-batch's contribution to one weight's gradient."""

    def put(self, weight: Tensor, add: AddGrad) -> None:
        """Arrange that `accumulate(weight, add)` is called once."""
        ...


def main_grad(weight: Tensor) -> Tensor:
    """FP32 accumulator of `weight`, created as zeros on first use."""
    acc = getattr(weight, "main_grad", None)
    if acc is None:
        acc = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        weight.main_grad = acc  # type: ignore[attr-defined]
    return acc


def forget(weight: Tensor) -> None:
    """Let the next contribution take the place of what the accumulator holds: zeroing without touching memory."""
    weight.main_grad_stale = True  # type: ignore[attr-defined]


def settle(weight: Tensor) -> None:
    """Zero the accumulator if it was forgotten and nothing came since; before anyone reads it."""
    if getattr(weight, "main_grad_stale", False):
        main_grad(weight).zero_()
        weight.main_grad_stale = False  # type: ignore[attr-defined]


def accumulate(weight: Tensor, add: AddGrad) -> None:
    """Give a contribution the accumulator of its weight: to add to, or, the first after `forget`, to write."""
    if getattr(weight, "main_grad_stale", False) and isinstance(add, Overwriting):
        add.write(main_grad(weight))
        weight.main_grad_stale = False  # type: ignore[attr-defined]
        return
    settle(weight)
    add(main_grad(weight))


class ImmediateSink:
    """Adds every contribution at once: the plain backward."""

    def put(self, weight: Tensor, add: AddGrad) -> None:
        """See `WeightGradSink`."""
        if weight.requires_grad:
            accumulate(weight, add)


class AddProduct(Protocol):
    """acc += left @ right, or acc = left @ right: `add_product`, or a kernel of `model.wgrad_kernels`."""

    def __call__(self, acc: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
        """acc FP32 [out, in], dense; left [out, rows], usually a transposed view; right [rows, in]."""
        ...


def add_product(acc: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
    """acc += left @ right, or acc = left @ right, with acc in FP32.

    Operands FP32 or BF16, whose product is rounded to BF16 on a CPU.
    """
    if left.dtype == torch.float32:
        acc.addmm_(left, right, beta=0 if overwrite else 1)
    elif acc.is_cuda:
        torch.addmm(acc, left, right, beta=0 if overwrite else 1, out_dtype=torch.float32, out=acc)
    elif overwrite:
        acc.copy_(left @ right)
    else:
        acc.add_(left @ right)


class Weighted(nn.Module):
    """A module whose weights' gradients go through a sink, as sums of products that `add_product` adds."""

    add_product: AddProduct = staticmethod(add_product)

    def __init__(self) -> None:
        super().__init__()
        self.sink: WeightGradSink = ImmediateSink()


def set_sink(module: nn.Module, sink: WeightGradSink) -> None:
    """Send the weight gradients of `module` and all below it to `sink`."""
    for child in module.modules():
        if isinstance(child, Weighted):
            child.sink = sink


class ProductGrad:
    """left @ right as a contribution; right is converted to `dtype` when it is computed, no sooner."""

    def __init__(
        self, left: Tensor, right: Tensor, dtype: torch.dtype | None = None, add: AddProduct = add_product
    ) -> None:
        self._left, self._right, self._dtype, self._add = left, right, dtype or right.dtype, add

    def __call__(self, acc: Tensor) -> None:
        """See `Overwriting`."""
        self._add(acc, self._left, self._right.to(self._dtype))

    def write(self, acc: Tensor) -> None:
        """See `Overwriting`."""
        self._add(acc, self._left, self._right.to(self._dtype), overwrite=True)
