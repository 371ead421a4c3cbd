"""Linear layers: y = x W^T without bias. The only file that decides in which precision a product is computed.

Backward gives the input's gradient; the weight's goes through the sink (`weight_grad.py`).
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.threads import spread
from model.weight_grad import AddProduct, ProductGrad, Weighted, WeightGradSink, add_product

if TYPE_CHECKING:
    from model.fp8.formats import QuantisedTensor


class FP8Call(Protocol):
    """A product in FP8 in place of the wide one: `model/fp8` has the implementations, `apply_fp8` sets them."""

    def __call__(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None = None
    ) -> Tensor:
        """x [..., in], weight [out, in] or [groups, out, in] with counts rows each -> [..., out]."""
        ...

    def weights_changed(self) -> None:
        """Called after every update of the weights."""
        ...

    def take_weight(self, tensor: "QuantisedTensor") -> None:
        """Read the weight from here on, in 128x128 blocks; its memory changes with every update."""
        ...


class _Linear(torch.autograd.Function):
    """x [..., I], weight [O, I] -> [..., O], computed in `dtype` where that is given, else in x's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, sink: WeightGradSink, dtype: torch.dtype | None, add: AddProduct
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.dtype, ctx.add = sink, dtype or x.dtype, add
        return x.to(ctx.dtype) @ weight.to(ctx.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (grad_y,) = grads
        x, weight = ctx.saved_tensors
        grad_x = (grad_y @ weight.to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            ctx.sink.put(weight, ProductGrad(grad_y.flatten(0, -2).t(), x.flatten(0, -2), ctx.dtype, ctx.add))
        return grad_x, None, None, None, None


class Linear(Weighted):
    """y = x W^T; weight [out_features, in_features].

    dtype: computation in this dtype although weight and input are in another (the router's FP32, report 3.3.1).
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.dtype = dtype
        self.fp8: FP8Call | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.fp8 is not None:
            return self.fp8(x, self.weight, self.sink)
        return _Linear.apply(x, self.weight, self.sink, self.dtype, self.add_product)  # type: ignore[return-value]


class _GroupedLinear(torch.autograd.Function):
    """Rows of consecutive groups, each times its own weight: x_RI, weight_EOI, counts (E ints, sum R) -> y_RO."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts: tuple[int, ...], sink: WeightGradSink, add: AddProduct
    ) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.counts, ctx.sink, ctx.add = counts, sink, add
        return grouped_product(x_RI, weight_EOI.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (grad_RO,) = grads
        x_RI, weight_EOI = ctx.saved_tensors
        grad_x = grouped_product(grad_RO, weight_EOI, ctx.counts) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            ctx.sink.put(weight_EOI, GroupedProductGrad(grad_RO, x_RI, ctx.counts, ctx.add))
        return grad_x, None, None, None, None


def grouped_product(x_RI: Tensor, weight_EIO: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Rows counts[0] of x times weight[0], the next counts[1] times weight[1], ...: [R, I] x [E, I, O] -> [R, O]."""
    if x_RI.is_cuda:
        ends_E = torch.tensor(counts, device=x_RI.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_RI, weight_EIO, offs=ends_E)
    num_rows, low = len(x_RI), x_RI.dtype == torch.bfloat16
    y_RO = x_RI.new_empty(num_rows, weight_EIO.shape[2])

    def products(experts: Iterator[tuple[int, slice]]) -> None:
        for expert, rows in experts:
            weight, end = weight_EIO[expert], rows.start + _tiled(rows.stop - rows.start)
            if not low or end == rows.stop:
                torch.mm(x_RI[rows], weight, out=y_RO[rows])
            elif end <= num_rows:  # also some of the next expert's rows, whose results are dropped
                y_RO[rows] = torch.mm(x_RI[rows.start : end], weight)[: rows.stop - rows.start]
            else:
                y_RO[rows] = torch.mm(_padded(x_RI[rows], end - rows.start), weight)[: rows.stop - rows.start]

    spread(products, _rows_of_experts(counts))
    return y_RO


# The CPU's BF16 product compiles a kernel for every new shape, 1.5 ms each, ten times a product of 512 rows. Experts'
# row counts are new in every step, so they are rounded up to a multiple of this and shapes recur.
TILE_ROWS = 64


def _tiled(count: int) -> int:
    return -(-count // TILE_ROWS) * TILE_ROWS


def _rows_of_experts(counts: tuple[int, ...]) -> list[tuple[int, slice]]:
    """Experts that have rows, and which."""
    ends = list(itertools.accumulate(counts))
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]


def _padded(rows_RD: Tensor, num_rows: int) -> Tensor:
    """The rows, and zeros up to `num_rows`."""
    return F.pad(rows_RD, (0, 0, 0, num_rows - len(rows_RD)))


def add_grouped_product(
    acc_EOI: Tensor, grad_RO: Tensor, x_RI: Tensor, counts: tuple[int, ...], *, overwrite: bool = False,
    add: AddProduct = add_product,
) -> None:  # fmt: skip
    """acc[e] += grad^T x over the rows of expert e, accumulators in FP32; overwrite: in place of what they held."""
    pad = x_RI.dtype == torch.bfloat16 and not x_RI.is_cuda

    def products(experts: Iterator[tuple[int, slice]]) -> None:
        for expert, rows in experts:
            grad, x = grad_RO[rows], x_RI[rows]
            if pad:
                grad, x = _padded(grad, _tiled(len(grad))), _padded(x, _tiled(len(x)))
            add(acc_EOI[expert], grad.t(), x, overwrite=overwrite)

    if x_RI.is_cuda:
        products(iter(_rows_of_experts(counts)))
    else:
        spread(products, _rows_of_experts(counts))
    if overwrite:
        for expert in (expert for expert, count in enumerate(counts) if not count):
            acc_EOI[expert].zero_()


class GroupedProductGrad:
    """What `add_grouped_product` adds, as a contribution to the weights' gradient."""

    def __init__(self, grad_RO: Tensor, x_RI: Tensor, counts: tuple[int, ...], add: AddProduct = add_product) -> None:
        self._grad_RO, self._x_RI, self._counts, self._add = grad_RO, x_RI, counts, add

    def __call__(self, acc_EOI: Tensor) -> None:
        """See `Overwriting`."""
        add_grouped_product(acc_EOI, self._grad_RO, self._x_RI, self._counts, add=self._add)

    def write(self, acc_EOI: Tensor) -> None:
        """See `Overwriting`."""
        add_grouped_product(acc_EOI, self._grad_RO, self._x_RI, self._counts, overwrite=True, add=self._add)


class GroupedLinear(Weighted):
    """One linear layer for each expert held here; weight [num_experts, out_features, in_features]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.fp8: FP8Call | None = None

    def forward(self, x_RI: Tensor, counts: tuple[int, ...]) -> Tensor:
        """x_RI: rows sorted by expert, counts[e] of them for expert e -> [R, out_features]."""
        if self.fp8 is not None:
            return self.fp8(x_RI, self.weight, self.sink, counts)
        y: Any = _GroupedLinear.apply(x_RI, self.weight, counts, self.sink, self.add_product)
        return y
