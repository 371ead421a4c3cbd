"""SwiGLU and the down projection, keeping the input of the SwiGLU in 1x128 FP8 tiles and nothing of its output.

The activation's output, the down projection's input, is recomputed in backward from that (report 3.2.3). Gradients are
those of the activation at the rounded input, as a kernel that reads the cache would give them. `FP8SwiGLU` is one
function over an `FP8Layer`; `CachedSwiGLU` leaves the projection to whatever computes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.dropping import Dropped, project
from model.fp8.formats import QuantisedTensor
from model.fp8.linear import FP8Layer, from_tensors, tensors_of
from model.fp8.quantise import Quantiser
from model.linear import GroupedLinear, Linear
from model.rowwise.kernels import TORCH, Rowwise
from model.weight_grad import WeightGradSink


class _SwiGLULinear(torch.autograd.Function):
    """gate_up [..., 2F], row weights [...] or None, weight [O, F] or [E, O, F] with counts -> [..., O]."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        row_weights: Tensor | None,
        weight: Tensor,
        sink: WeightGradSink,
        counts: tuple[int, ...] | None,
        layer: FP8Layer,
        rowwise: Rowwise,
    ) -> Tensor:
        rows = gate_up.flatten(0, -2)
        counts = (len(rows),) if counts is None else counts
        layer.watch.sample(layer.name, "swiglu_input", rows, layer.input_rows, counts)
        kept = layer.input_rows.quantise(rows, counts)
        layer.watch.check(layer.name, "swiglu_input", kept.scales)
        ctx.like = (kept.tile, kept.rows)
        ctx.save_for_backward(weight, row_weights, *tensors_of(kept))
        ctx.sink, ctx.counts, ctx.layer, ctx.rowwise = sink, counts, layer, rowwise
        activated = rowwise.swiglu(rows, _flat(row_weights))
        layer.watch_input(activated, weight, counts)
        hidden = layer.products.rounded(layer.input_rows, activated, counts)
        layer.watch.check_rounded(layer.name, "input", hidden)
        y = layer.products.fprop(hidden, layer.weight(weight))
        return y.to(gate_up.dtype).view(*gate_up.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, row_weights, *tensors = ctx.saved_tensors
        layer, counts, rowwise, dtype = ctx.layer, ctx.counts, ctx.rowwise, grad.dtype
        grad_RO = grad.flatten(0, -2)
        layer.watch_gradient(grad_RO, counts)
        kept = from_tensors(tuple(tensors), ctx.like)
        assert isinstance(kept, QuantisedTensor)
        rounded = layer.products.rounded(layer.gradient_rows, grad_RO, counts)
        layer.watch.check_rounded(layer.name, "gradient", rounded)
        grad_hidden = layer.products.dgrad(rounded, layer.weight(weight)).to(dtype)
        factors = _flat(row_weights)

        def hidden() -> Tensor:
            return rowwise.swiglu(_wide(layer, kept, dtype), factors)

        gradient = rowwise.swiglu_backward(_wide(layer, kept, dtype), factors, grad_hidden)
        if ctx.needs_input_grad[2]:
            held, columns = layer.held_gradient(grad_RO, counts), _columns(layer, hidden, counts)

            def add(acc: Tensor) -> None:
                layer.products.add_wgrad(acc, layer.gradient_operand(held, counts), columns())

            ctx.sink.put(weight, add)
        grad_rows = None
        if row_weights is not None and gradient.weights is not None:
            grad_rows = gradient.weights.view(row_weights.shape)
        grad_gate_up = gradient.gate_up.view(*grad.shape[:-1], gradient.gate_up.shape[1])
        return grad_gate_up, grad_rows, None, None, None, None, None


def _columns(layer: FP8Layer, hidden: Callable[[], Tensor], counts: tuple[int, ...]) -> Callable[[], Any]:
    """The SwiGLU's output in the tiles of Wgrad for when it runs; rounded at once where that is what may wait."""
    if layer.hold_rounded:
        columns = layer.input_columns.quantise(hidden(), counts)
        return lambda: layer.products.requantised(layer.input_columns, columns)
    return lambda: layer.products.rounded(layer.input_columns, hidden(), counts)


def _flat(row_weights: Tensor | None) -> Tensor | None:
    return None if row_weights is None else row_weights.flatten()


def _wide(layer: FP8Layer, kept: QuantisedTensor, dtype: torch.dtype) -> Tensor:
    return layer.input_rows.widen(kept).to(dtype)


def swiglu_linear(
    gate_up: Tensor,
    weight: Tensor,
    *,
    layer: FP8Layer,
    sink: WeightGradSink,
    row_weights: Tensor | None = None,
    counts: tuple[int, ...] | None = None,
    rowwise: Rowwise = TORCH,
) -> Tensor:
    """linear(silu(gate) * up * row weight) of gate_up [..., 2F], keeping gate_up in FP8 alone for backward.

    weight [out, F], or [groups, out, F] with counts rows each. layer: of the linear; its `input_cache` has no say here.
    """
    return _SwiGLULinear.apply(gate_up, row_weights, weight, sink, counts, layer, rowwise)  # type: ignore[return-value]


@dataclass(frozen=True)
class FP8SwiGLU:
    """`swiglu_linear` as the MLP and the experts call it; layer: of their down projection."""

    layer: FP8Layer

    def __call__(
        self,
        gate_up: Tensor,
        down: Linear | GroupedLinear,
        row_weights: Tensor | None = None,
        counts: tuple[int, ...] | None = None,
        rowwise: Rowwise = TORCH,
    ) -> Tensor:
        """See `model.mlp.SwiGLUDown`."""
        return swiglu_linear(
            gate_up,
            down.weight,
            layer=self.layer,
            sink=down.sink,
            row_weights=row_weights,
            counts=counts,
            rowwise=rowwise,
        )


class _CachedSwiGLU(torch.autograd.Function):
    """gate_up [R, 2F], row weights [R] or None -> [R, F]; keeps `values` and `scales`, gate_up rounded 1x128."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        row_weights: Tensor | None,
        values: Tensor,
        scales: Tensor,
        like: Any,
        rowwise: Rowwise,
    ) -> Tensor:
        ctx.save_for_backward(row_weights, values, scales)
        ctx.like, ctx.rowwise, ctx.dtype = like, rowwise, gate_up.dtype
        return rowwise.swiglu(gate_up, row_weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_weights, *tensors = ctx.saved_tensors
        kept = from_tensors(tuple(tensors), ctx.like[0])
        gradient = ctx.rowwise.swiglu_backward(ctx.like[1].widen(kept).to(ctx.dtype), row_weights, grads[0])
        return gradient.gate_up, gradient.weights, None, None, None, None


@dataclass(frozen=True)
class CachedSwiGLU:
    """SwiGLU that keeps its input in FP8, and a down projection whose input is computed again from that.

    For projections that compute in FP8 elsewhere (Transformer Engine). rows: quantiser of the cache.
    """

    rows: Quantiser

    def __call__(
        self,
        gate_up: Tensor,
        down: Linear | GroupedLinear,
        row_weights: Tensor | None = None,
        counts: tuple[int, ...] | None = None,
        rowwise: Rowwise = TORCH,
    ) -> Tensor:
        """See `model.mlp.SwiGLUDown`."""
        matrix, weights = gate_up.flatten(0, -2), _flat(row_weights)
        kept = self.rows.quantise(matrix.detach(), counts)
        like, dtype = ((kept.tile, kept.rows), self.rows), gate_up.dtype
        hidden: Tensor = _CachedSwiGLU.apply(matrix, weights, kept.values, kept.scales, like, rowwise)  # type: ignore
        plain = None if weights is None else weights.detach()
        again = Dropped(lambda: (rowwise.swiglu(self.rows.widen(kept).to(dtype), plain),)).part(0)
        return project(down, hidden.view(*gate_up.shape[:-1], hidden.shape[1]), again, counts)
