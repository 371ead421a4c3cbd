"""Linear layers in FP8: forward, input gradient and weight gradient from operands rounded in blocks.

Kept for backward: the input in E4M3 (one byte a number and one a tile), in E5M6 where the layer follows attention, and
nothing in BF16. The weight gradient's 128x1 tiles are made from that when the closure runs, the gradient's from BF16.
With less memory (`FP8Layer.call_again`, `hold_rounded`) the same numbers are rounded at another time, to the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.dropping import Again
from model.fp8.e5m6 import E5M6Kernels, E5M6Tensor, TorchE5M6, dequantise_e5m6, quantise_e5m6
from model.fp8.formats import AMAX_FLOOR, Layout, QuantisedTensor, Rows, Scales, Tile
from model.fp8.gemm import ExactProducts, FastProducts, Products
from model.fp8.native import NativeKernels
from model.fp8.quantise import Kernels, Quantiser, TorchKernels
from model.fp8.watch import Watch
from model.weight_grad import WeightGradSink


class InputCache(Enum):
    """In which form a layer keeps its input for the weight gradient.

    FP8: the 1x128 tiles of forward, requantised to 128x1 in backward (the report's way). WIDE: 128x1 tiles made in
    forward from the wide input (Transformer Engine's way): a second pass then, no second rounding with any scales.
    E5M6: twelve bits, for the linear after attention.
    """

    FP8 = "fp8"
    WIDE = "wide"
    E5M6 = "e5m6"


@dataclass(frozen=True)
class FP8Recipe:
    """How the linears of a model compute in FP8.

    scales: of every tile. exact: the oracle's products in place of the fast ones. native: compiled quantisers in place
    of plain torch (the same bits). weights_per_step: keep a weight's rounded form until `weights_changed` is called;
    otherwise it is made anew in every forward and backward. amax_floor: of inputs and weights; gradient_amax_floor: of
    gradients, which are small (0: a zero tile has scale 1).
    """

    scales: Scales = Scales.POWER_OF_TWO
    input_cache: InputCache = InputCache.FP8
    exact: bool = False
    native: bool = True
    weights_per_step: bool = True
    amax_floor: float = AMAX_FLOOR
    gradient_amax_floor: float = AMAX_FLOOR


class StaleWeight(RuntimeError):
    """A weight changed and its rounded form, kept for the step, did not."""


# So many numbers of a weight, evenly spread, are compared with those of the time when it was rounded.
SAMPLED = 4096


class RoundedWeight:
    """One weight as products read it, kept from one optimiser step to the next; made of a wide weight or of its E4M3.

    Memory: BF16, two bytes a weight (fast form), or E4M3, one byte (exact form; none of its own where E4M3 is given). A
    weight that is a view of a flat buffer does not count its changes, so whoever updates weights must call
    `weights_changed`; forgetting it is noticed by a sample of the numbers, and raises StaleWeight.
    """

    def __init__(self) -> None:
        self._rounded: Any = None
        self._sample: Tensor | None = None

    def get(self, weight: Tensor, rounded: Callable[[Tensor], Any]) -> Any:
        """The rounded form, which `rounded` makes if there is none."""
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)]
        if self._rounded is None:
            self._rounded, self._sample = rounded(weight), sample.clone()
        elif self._sample is None or not torch.equal(_bits(sample), _bits(self._sample)):
            raise StaleWeight(
                f"a weight of shape {tuple(weight.shape)} changed after it was rounded to FP8: call "
                "model.fp8.linear.weights_changed(model) after every update, or set weights_per_step=False"
            )
        return self._rounded

    def drop(self) -> None:
        """Round anew at the next use."""
        self._rounded = self._sample = None


def _bits(x: Tensor) -> Tensor:
    """Its bits as integers: NaN is equal to itself."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def round_weight(weight: Tensor, quantiser: Quantiser, products: Products[Any]) -> Any:
    """weight [out, in] or [groups, out, in] in 128x128 blocks that do not cross groups."""
    num_groups = 1 if weight.dim() == 2 else len(weight)
    return products.rounded(quantiser, weight.detach(), (weight.shape[-2],) * num_groups)


@dataclass
class FP8Layer:
    """What one linear or grouped linear needs to compute in FP8; `model/linear.py` calls it where it is set.

    name: of the linear in the model, for `watch`. hold_rounded: a weight gradient that waits holds the output's
    gradient in its 128x1 tiles, one byte a number, instead of wide. given: the weight in 128x128 blocks, where somebody
    rounds it for the layer; the parameter's own numbers are not looked at then.
    """

    recipe: FP8Recipe
    name: str = ""
    watch: Watch = field(default_factory=Watch)
    kept: RoundedWeight = field(default_factory=RoundedWeight)
    hold_rounded: bool = False
    given: QuantisedTensor | None = None

    def __post_init__(self) -> None:
        recipe = self.recipe
        native = NativeKernels() if recipe.native else None
        kernels: Kernels = native or TorchKernels()
        self.e5m6: E5M6Kernels = native or TorchE5M6()
        self.products: Products[Any] = ExactProducts() if recipe.exact else FastProducts()
        plain = recipe.scales is Scales.FP32  # whose products go block by block
        left, right = (Layout.PLAIN, Layout.PLAIN) if plain else (Layout.TURNED, Layout.PADDED)
        for_input, for_gradient = (
            partial(Quantiser, scales=recipe.scales, amax_floor=floor, kernels=kernels)
            for floor in (recipe.amax_floor, recipe.gradient_amax_floor)
        )
        self.input_rows, self.weight_blocks = for_input(Tile.ROW), for_input(Tile.BLOCK)
        self.input_columns = for_input(Tile.COLUMN, layout=right)
        self.gradient_rows, self.gradient_columns = for_gradient(Tile.ROW), for_gradient(Tile.COLUMN, layout=left)

    def __call__(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None = None
    ) -> Tensor:
        """x [..., in]; weight [out, in], or [groups, out, in] with counts rows each -> [..., out] in x's dtype."""
        return _FP8Linear.apply(x, weight, sink, counts, self, None)  # type: ignore[return-value]

    def call_again(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None, again: Again
    ) -> Tensor:
        """As the call, but nothing of x is kept: `again` gives it for the backward, where it is rounded to the same."""
        return _FP8Linear.apply(x, weight, sink, counts, self, again)  # type: ignore[return-value]

    def watch_input(self, x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> None:
        """Sample input and weight if a sample is due; of a given weight whoever rounds it has the figures."""
        self.watch.sample(self.name, "input", x, self.input_rows, counts)
        if self.given is not None:
            return
        num_groups = 1 if weight.dim() == 2 else len(weight)
        self.watch.sample(self.name, "weight", weight, self.weight_blocks, (weight.shape[-2],) * num_groups)

    def watch_gradient(self, grad: Tensor, counts: tuple[int, ...]) -> None:
        """Sample the output's gradient in both its tiles if a sample is due."""
        self.watch.sample(self.name, "gradient", grad, self.gradient_rows, counts)
        self.watch.sample(self.name, "gradient_columns", grad, self.gradient_columns, counts)

    def weight(self, weight: Tensor) -> Any:
        """The weight in 128x128 blocks, as products read it."""
        source, make = (weight, self._rounded) if self.given is None else (self.given.values, self._of_given)
        return self.kept.get(source, make) if self.recipe.weights_per_step else make(source)

    def take_weight(self, tensor: QuantisedTensor) -> None:
        """Read the weight from here on; its memory may change where `weights_changed` is called."""
        self.given = tensor
        self.kept.drop()

    def _of_given(self, _: Tensor) -> Any:
        assert self.given is not None
        self.watch.check(self.name, "weight", self.given.scales)
        return self.products.requantised(self.weight_blocks, self.given)

    def _rounded(self, weight: Tensor) -> Any:
        rounded = round_weight(weight, self.weight_blocks, self.products)
        self.watch.check_rounded(self.name, "weight", rounded)
        return rounded

    def weights_changed(self) -> None:
        """Round the weight anew at its next use."""
        self.kept.drop()

    def take_input(self, x: Tensor, counts: tuple[int, ...]) -> tuple["KeptInput", Any]:
        """x to keep for the weight gradient, and x rounded 1x128 for Fprop."""
        kind = self.recipe.input_cache
        if kind is InputCache.FP8:
            return self.products.cached(self.input_rows, x, counts)
        rounded = self.products.rounded(self.input_rows, x, counts)
        if kind is InputCache.WIDE:
            return self.input_columns.quantise(x, counts), rounded
        return quantise_e5m6(x, self.e5m6, amax_floor=self.recipe.amax_floor), rounded

    def keep(self, x: Tensor, counts: tuple[int, ...]) -> "KeptInput":
        """x as `take_input` keeps it."""
        kind = self.recipe.input_cache
        if kind is InputCache.E5M6:
            return quantise_e5m6(x, self.e5m6, amax_floor=self.recipe.amax_floor)
        return (self.input_columns if kind is InputCache.WIDE else self.input_rows).quantise(x, counts)

    def held_gradient(self, grad: Tensor, counts: tuple[int, ...]) -> "Tensor | QuantisedTensor":
        """The output's gradient as a weight gradient that may have to wait holds it."""
        return self.gradient_columns.quantise(grad, counts) if self.hold_rounded else grad

    def gradient_operand(self, held: "Tensor | QuantisedTensor", counts: tuple[int, ...]) -> Any:
        """What was held, rounded 128x1 for Wgrad."""
        if isinstance(held, QuantisedTensor):
            return self.products.requantised(self.gradient_columns, held)
        return self.products.rounded(self.gradient_columns, held, counts)

    def columns_of(self, kept: "KeptInput", counts: tuple[int, ...]) -> Any:
        """What was kept, rounded 128x1 for Wgrad."""
        if isinstance(kept, E5M6Tensor):
            return self.products.rounded(self.input_columns, dequantise_e5m6(kept, self.e5m6), counts)
        return self.products.requantised(self.input_columns, kept)


KeptInput = QuantisedTensor | E5M6Tensor


def tensors_of(kept: KeptInput) -> tuple[Tensor, ...]:
    """The tensors of a kept input, for save_for_backward."""
    return (kept.high, kept.low, kept.exponents) if isinstance(kept, E5M6Tensor) else (kept.values, kept.scales)


def from_tensors(tensors: tuple[Tensor, ...], like: tuple[Tile, Rows] | None) -> KeptInput:
    """The kept input of saved tensors; `like`: its tile and rows, None for E5M6."""
    if like is None:
        high, low, exponents = tensors
        return E5M6Tensor(high, low, exponents, tuple(high.shape))
    values, scales = tensors
    return QuantisedTensor(values, scales, *like, tuple(values.shape))


class _FP8Linear(torch.autograd.Function):
    """x [..., I], weight [O, I] or [E, O, I] with counts -> [..., O]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        sink: WeightGradSink,
        counts: tuple[int, ...] | None,
        layer: FP8Layer,
        again: Again | None,
    ) -> Tensor:
        x_RI = x.flatten(0, -2)
        counts = (len(x_RI),) if counts is None else counts
        layer.watch_input(x_RI, weight, counts)
        ctx.sink, ctx.counts, ctx.layer, ctx.again = sink, counts, layer, again
        if again is not None:
            rounded = layer.products.rounded(layer.input_rows, x_RI, counts)
            layer.watch.check_rounded(layer.name, "input", rounded)
            ctx.save_for_backward(weight)
        else:
            kept, rounded = layer.take_input(x_RI, counts)
            layer.watch.check(layer.name, "input", tensors_of(kept)[-1])
            ctx.like = (kept.tile, kept.rows) if isinstance(kept, QuantisedTensor) else None
            ctx.save_for_backward(weight, *tensors_of(kept))
        y_RO = layer.products.fprop(rounded, layer.weight(weight))
        return y_RO.to(x.dtype).view(*x.shape[:-1], y_RO.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, *tensors = ctx.saved_tensors
        layer, counts, grad_RO, grad_x = ctx.layer, ctx.counts, grad.flatten(0, -2), None
        layer.watch_gradient(grad_RO, counts)
        if ctx.needs_input_grad[0]:
            rounded = layer.products.rounded(layer.gradient_rows, grad_RO, counts)
            layer.watch.check_rounded(layer.name, "gradient", rounded)
            grad_RI = layer.products.dgrad(rounded, layer.weight(weight))
            grad_x = grad_RI.to(grad.dtype).view(*grad.shape[:-1], grad_RI.shape[1])
        if ctx.needs_input_grad[1]:
            if ctx.again is None:
                kept = from_tensors(tuple(tensors), ctx.like)
            else:
                kept = layer.keep(ctx.again().flatten(0, -2), counts)
            held = layer.held_gradient(grad_RO, counts)
            ctx.sink.put(weight, lambda acc: add_weight_grad(layer, acc, held, kept, counts))
        ctx.again = None
        return grad_x, None, None, None, None, None


def add_weight_grad(
    layer: FP8Layer, acc: Tensor, held: Tensor | QuantisedTensor, kept: KeptInput, counts: tuple[int, ...]
) -> None:
    """acc [(groups,) out, in] in FP32 += grad^T x with both rounded 128x1 along the rows; held: see `held_gradient`."""
    layer.products.add_wgrad(acc, layer.gradient_operand(held, counts), layer.columns_of(kept, counts))


def weights_changed(module: nn.Module) -> None:
    """Round the weights of every FP8 layer below `module` anew at their next use: call it after every update."""
    for child in module.modules():
        layer = getattr(child, "fp8", None)
        if layer is not None:
            layer.weights_changed()
