"""Tensors of which nothing is kept for the backward: they are computed again there, once, when a gradient first asks.

The report (section 3.2.3) keeps no output of an RMSNorm, of the up-projections of attention or of a SwiGLU: what they
are made of is kept anyway, and is smaller. `project` is a linear that keeps nothing of its input; `dropping` lets
anybody's kernel save a note in place of a tensor and find the tensor when its gradient reads it. So no product is
repeated whose result nobody reads, and numbers are the same to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.linear import GroupedLinear, GroupedProductGrad, Linear, grouped_product
from model.weight_grad import AddProduct, ProductGrad, WeightGradSink

Tensors = tuple[Tensor, ...]
Again = Callable[[], Tensor]  # gives a tensor that was not kept


class Dropped:
    """Tensors that `again` computes, all at once and at most once for as long as anybody holds this.

    again: reads only what is kept and detached, so that no graph hangs on it.
    """

    def __init__(self, again: Callable[[], Tensors]) -> None:
        self._again = again
        self._values: Tensors | None = None

    def part(self, index: int) -> Again:
        """One of them, once somebody asks."""
        return lambda: self[index]

    def __getitem__(self, index: int) -> Tensor:
        if self._values is None:
            with torch.no_grad():
                self._values = self._again()
        return self._values[index]


@dataclass(frozen=True)
class _Note:
    """Saved in place of a tensor: which part of which dropped one it was."""

    dropped: Dropped
    index: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The part, of a dropped tensor that lies in memory as the first one did."""
        return self.dropped[self.index].as_strided(self.size, self.stride, self.offset)


@contextmanager
def dropping(dropped: Dropped | None, *tensors: Tensor) -> Iterator[None]:
    """What is saved of `tensors` inside, or of views of them, is computed again by `dropped`, in that order.

    None: everything is kept as always. A copy that a kernel makes of such a tensor and saves is kept too: nothing but
    memory is lost then. Not for what finds its weight's accumulator on the saved weight: autograd gives it another
    tensor object here.
    """
    if dropped is None or not torch.is_grad_enabled():
        yield
        return
    places = {tensor.untyped_storage().data_ptr(): (index, tensor.dtype) for index, tensor in enumerate(tensors)}

    def pack(saved: Tensor) -> Any:
        index, dtype = places.get(saved.untyped_storage().data_ptr(), (None, None))
        if index is None or saved.dtype != dtype:
            return saved
        return _Note(dropped, index, tuple(saved.shape), saved.stride(), int(saved.storage_offset()))

    def unpack(packed: Any) -> Tensor:
        return packed.tensor() if isinstance(packed, _Note) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def project(
    linear: Linear | GroupedLinear, x: Tensor, again: Again | None = None, counts: tuple[int, ...] | None = None
) -> Tensor:
    """linear(x), with counts where it is grouped; again: gives x for the weight's gradient, so that none of it is kept.

    Products of elsewhere (`linear.fp8`) must have a `call_again`, as `model.recompute.keep_less` arranges.
    """
    if again is None or not torch.is_grad_enabled():
        if isinstance(linear, Linear):
            return linear(x)
        assert counts is not None, "rows of each expert"
        return linear(x, counts)
    if linear.fp8 is not None:
        return linear.fp8.call_again(x, linear.weight, linear.sink, counts, again)  # type: ignore[attr-defined]
    if isinstance(linear, Linear):
        y: Any = _LinearAgain.apply(x, linear.weight, linear.sink, linear.dtype, again, linear.add_product)
    else:
        y = _GroupedLinearAgain.apply(x, linear.weight, counts, linear.sink, again, linear.add_product)
    return y


class _LinearAgain(torch.autograd.Function):
    """As `model.linear._Linear`; the input comes again for the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, sink: WeightGradSink, dtype: torch.dtype | None, again: Again,
        add: AddProduct,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight)
        ctx.sink, ctx.dtype, ctx.again, ctx.input_dtype, ctx.add = sink, dtype or x.dtype, again, x.dtype, add
        return x.to(ctx.dtype) @ weight.to(ctx.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,), (weight,) = grads, ctx.saved_tensors
        grad_x = (grad_y @ weight.to(ctx.dtype)).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            x_TI = ctx.again().flatten(0, -2)
            ctx.sink.put(weight, ProductGrad(grad_y.flatten(0, -2).t(), x_TI, ctx.dtype, ctx.add))
        ctx.again = None
        return grad_x, None, None, None, None, None


class _GroupedLinearAgain(torch.autograd.Function):
    """As `model.linear._GroupedLinear`; the input comes again for the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts: tuple[int, ...], sink: WeightGradSink, again: Again,
        add: AddProduct,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight_EOI)
        ctx.counts, ctx.sink, ctx.again, ctx.add = counts, sink, again, add
        return grouped_product(x_RI, weight_EOI.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_RO,), (weight_EOI,), counts = grads, ctx.saved_tensors, ctx.counts
        grad_x = grouped_product(grad_RO, weight_EOI, counts) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            ctx.sink.put(weight_EOI, GroupedProductGrad(grad_RO, ctx.again(), counts, ctx.add))
        ctx.again = None
        return grad_x, None, None, None, None, None
