"""DeepGEMM as the back end of the experts' FP8 products on Hopper: the oracle's tiles, its grouped kernels.

Imported when asked for and not before. Nothing here has run on a GPU: shapes, layouts, dtypes and the order of
arguments are those of its sources from 2.1.1 to 2.6 (the names of arguments changed in between, so none is used), and a
stand-in with the same demands holds the adapter to the oracle on a CPU. Other products stay with `fp8.backend`.

    Fprop, Dgrad   m_grouped_fp8_gemm_nt_contiguous   rows of groups filled up to 128, results in BF16
    Wgrad          k_grouped_fp8_gemm_nt_contiguous   added in FP32 to what is there, operands dense along the tokens

Kept for backward, one byte a number: the input's 1x128 tiles, turned into 128x1 tiles when the weight gradient runs, or
with `fp8.input_cache=wide` 128x1 tiles made of the wide input at once.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.backends import MissingBackend, version_problem
from model.dropping import Again
from model.fp8.config import CAPABILITY, DEEP_GEMM_FROM, DEEP_GEMM_UNTIL, FP8Config
from model.fp8.formats import AMAX_FLOOR, EXPONENT_BIAS, TILE_SIZE, QuantisedTensor, Rows, Scales, Tile
from model.fp8.quantise import Quantiser
from model.linear import GroupedLinear
from model.weight_grad import WeightGradSink

KEY = "fp8.grouped=deep_gemm"
INSTEAD = "use fp8.grouped=same, the back end of the other products"
NO_GROUP = -1  # the group of a row that only fills up


def load_deep_gemm(config: FP8Config) -> Any:
    """The module; MissingBackend in one line with what was found, what is needed, what to do."""
    problem = version_problem("DeepGEMM", "deep_gemm", DEEP_GEMM_FROM, DEEP_GEMM_UNTIL)
    if problem:
        raise MissingBackend(f"{KEY}: {problem}: build it from its sources, or {INSTEAD}")
    if config.recompute_swiglu:
        raise MissingBackend(f"{KEY} has no fp8.recompute_swiglu=true: use fp8.recompute_swiglu=false, or {INSTEAD}")
    found = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    if found != CAPABILITY:
        here = "there is no GPU" if found is None else f"this GPU has {found}"
        raise MissingBackend(f"{KEY} needs a GPU of compute capability {CAPABILITY}, {here}: {INSTEAD}")
    try:
        return importlib.import_module("deep_gemm")
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingBackend(f"{KEY}: DeepGEMM cannot be imported ({str(error).splitlines()[0]}): {INSTEAD}") from None


@dataclass(frozen=True)
class Filled:
    """Where rows lie once every group is filled up to a multiple of 128.

    counts: rows of each group, filled up; index int64 [rows]: of each row; groups int32 [filled rows]: of each filled
    row its group, or NO_GROUP.
    """

    counts: tuple[int, ...]
    index: Tensor
    groups: Tensor

    @staticmethod
    def of(counts: tuple[int, ...], device: torch.device) -> "Filled":
        """For groups of counts[g] rows."""
        filled = tuple(-(-count // TILE_SIZE) * TILE_SIZE for count in counts)
        numbers = torch.arange(len(counts), dtype=torch.int32, device=device)
        groups = torch.full((sum(filled),), NO_GROUP, dtype=torch.int32, device=device)
        index = torch.arange(sum(counts), device=device)
        start = gap = 0
        for count, room in zip(counts, filled, strict=True):
            index[start : start + count] += gap
            start, gap = start + count, gap + room - count
        groups[index] = numbers.repeat_interleave(torch.tensor(counts, device=device), output_size=sum(counts))
        return Filled(filled, index, groups)

    def rows(self, x: Tensor) -> Tensor:
        """x [rows, ...] with zeros where groups are filled up."""
        return x.new_zeros(len(self.groups), x.shape[1]).index_copy_(0, self.index, x)

    def spread(self, tensor: QuantisedTensor) -> QuantisedTensor:
        """A tensor in 1x128 tiles with rows of zeros, scale 1, where groups are filled up."""
        room = self.rows(tensor.values.view(torch.uint8))
        one = EXPONENT_BIAS if tensor.power_of_two else 1
        scales = tensor.scales.new_full((len(self.groups), tensor.scales.shape[1]), one)
        scales.index_copy_(0, self.index, tensor.scales)
        rows, shape = Rows.of(self.counts), tuple(room.shape)
        return QuantisedTensor(room.view(torch.float8_e4m3fn), scales, Tile.ROW, rows, shape)


class DeepGEMMGrouped:
    """`FP8Call` of a stack of experts' weights [groups, out, in]; sizes that are multiples of 128."""

    def __init__(self, gemm: Any, config: FP8Config, weight: Tensor) -> None:
        for size in weight.shape[1:]:
            if size % TILE_SIZE:
                sizes = f"{weight.shape[1]} x {weight.shape[2]}"
                raise MissingBackend(
                    f"{KEY}: the experts' weights are {sizes}, its products take multiples of {TILE_SIZE}: "
                    f"choose such sizes, or {INSTEAD}"
                )
        self.gemm, self._weight = gemm, None
        self._given: QuantisedTensor | None = None
        self._keeps_rows = config.input_cache == "fp8"
        scales = Scales.POWER_OF_TWO if config.scales == "pow2" else Scales.FP32
        of_input, of_gradient = (
            partial(Quantiser, scales=scales, amax_floor=floor) for floor in (AMAX_FLOOR, config.gradient_amax_floor)
        )
        self.blocks, self.rows, self.columns = of_input(Tile.BLOCK), of_input(Tile.ROW), of_input(Tile.COLUMN)
        self.gradient_rows, self.gradient_columns = of_gradient(Tile.ROW), of_gradient(Tile.COLUMN)

    def __call__(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None = None
    ) -> Tensor:
        """See `model.linear.FP8Call`; x [rows, in], counts given."""
        assert counts is not None, "a stack of experts has counts"
        return _Grouped.apply(x, weight, sink, counts, self, None)  # type: ignore[return-value]

    def call_again(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None, again: Again
    ) -> Tensor:
        """As the call, but nothing of x is kept: `again` gives it for the backward, where it is rounded to the same."""
        assert counts is not None, "a stack of experts has counts"
        return _Grouped.apply(x, weight, sink, counts, self, again)  # type: ignore[return-value]

    def weights_changed(self) -> None:
        """Round the weight anew at its next use."""
        self._weight = None

    def take_weight(self, tensor: QuantisedTensor) -> None:
        """See `model.linear.FP8Call`."""
        self._given, self._weight = tensor, None

    def rounded_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """E4M3 [groups, out, in] and FP32 scales [groups, out / 128, in / 128], kept until `weights_changed`."""
        if self._weight is None:
            groups, out, _ = weight.shape
            tensor = self._given or self.blocks.quantise(weight.detach(), (out,) * groups)
            self._weight = (tensor.values.view(weight.shape), tensor.wide_scales.view(groups, out // TILE_SIZE, -1))
        return self._weight

    def take_input(self, x: Tensor, filled: Filled) -> tuple[QuantisedTensor, QuantisedTensor]:
        """x to keep for the weight gradient, and x rounded 1x128 for Fprop."""
        rounded = self.rows.quantise(x)
        return rounded if self._keeps_rows else self.columns.quantise(filled.rows(x), filled.counts), rounded

    def product(self, left: QuantisedTensor, filled: Filled, values: Tensor, scales: Tensor) -> Tensor:
        """left [filled rows, K] times the transposed [N, K] of each row's group -> BF16 [rows, N]."""
        room = filled.spread(left)
        y = torch.empty(len(room.values), values.shape[1], dtype=torch.bfloat16, device=values.device)
        self.gemm.m_grouped_fp8_gemm_nt_contiguous((room.values, room.wide_scales), (values, scales), y, filled.groups)
        return y.index_select(0, filled.index)

    def add_wgrad(self, acc: Tensor, grad: Tensor, kept: QuantisedTensor, counts: tuple[int, ...]) -> None:
        """acc [groups, out, in] in FP32 += grad^T x, both in 128x1 tiles, the gradient's from BF16."""
        filled = Filled.of(counts, grad.device)
        columns = kept if kept.tile is Tile.COLUMN else self.columns.requantise(filled.spread(kept))
        grad_columns = self.gradient_columns.quantise(filled.rows(grad), filled.counts)
        factors = [_along_tokens(side, filled.counts) for side in (grad_columns, columns)]
        lengths = torch.tensor(filled.counts, dtype=torch.int32, device=grad.device)
        self.gemm.k_grouped_fp8_gemm_nt_contiguous(*factors, acc, list(filled.counts), lengths, acc)


def _along_tokens(tensor: QuantisedTensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Every group's [columns, rows] one after another, flat, and FP32 scales [columns, blocks of rows]."""
    parts = [part.t().reshape(-1) for part in tensor.values.view(torch.uint8).split(counts)]
    return torch.cat(parts).view(torch.float8_e4m3fn), tensor.wide_scales.t()


class _Grouped(torch.autograd.Function):
    """x [R, I], weight [E, O, I], counts -> [R, O]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...], layer: DeepGEMMGrouped,
        again: Again | None,
    ) -> Tensor:  # fmt: skip
        filled = Filled.of(counts, x.device)
        if again is None:
            kept, rounded = layer.take_input(x, filled)
            ctx.save_for_backward(weight, kept.values, kept.scales)
            ctx.like = (kept.tile, kept.rows)
        else:
            rounded = layer.rows.quantise(x)
            ctx.save_for_backward(weight)
        ctx.sink, ctx.counts, ctx.layer, ctx.again = sink, counts, layer, again
        return layer.product(rounded, filled, *layer.rounded_weight(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, *saved) = grads, ctx.saved_tensors
        layer, counts, grad_x = ctx.layer, ctx.counts, None
        if ctx.needs_input_grad[0]:
            turned, turned_scales = (part.mT.contiguous() for part in layer.rounded_weight(weight))
            rounded, filled = layer.gradient_rows.quantise(grad), Filled.of(counts, grad.device)
            grad_x = layer.product(rounded, filled, turned, turned_scales).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            if ctx.again is None:
                (values, scales), (tile, rows) = saved, ctx.like
                kept = QuantisedTensor(values, scales, tile, rows, tuple(values.shape))
            else:
                kept, _ = layer.take_input(ctx.again(), Filled.of(counts, grad.device))
            ctx.sink.put(weight, lambda acc: layer.add_wgrad(acc, grad, kept, counts))
        ctx.again = None
        return grad_x, None, None, None, None, None


def apply_deep_gemm(linears: Mapping[str, Any], config: FP8Config) -> None:
    """Let the experts' linears among these compute in DeepGEMM."""
    gemm = load_deep_gemm(config)
    for linear in linears.values():
        if isinstance(linear, GroupedLinear):
            linear.fp8 = DeepGEMMGrouped(gemm, config, linear.weight)
