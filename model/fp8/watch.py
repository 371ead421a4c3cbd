"""Where FP8 hurts: of every tensor that a layer rounds, its amax, saturation, underflow and error against the wide one.

A sample takes each tensor once, in the first micro-batch that passes after `arm`; between samples nothing is computed
but a look at the scales, on which NaN or infinity in a tile leaves a mark (see quantise.py).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.fp8.formats import LARGEST_E4M3, NAN_EXPONENT, Operand, QuantisedTensor
from model.fp8.quantise import Quantiser


@dataclass(frozen=True)
class TensorStats:
    """One rounded tensor of one layer.

    tensor: input, swiglu_input, weight, gradient (1x128) or gradient_columns (128x1). amax: largest magnitude.
    saturated: share of numbers at the largest value 448 (a tile's scale comes from its own amax, so nothing is cut off;
    many numbers there mean a tile without range). underflow: share of the non-zero numbers that became zero.
    relative_error: norm of the difference over the norm, 0 for a zero tensor. NaN where the tensor is not finite.
    """

    layer: str
    tensor: str
    amax: float
    saturated: float
    underflow: float
    relative_error: float


def tensor_stats(layer: str, tensor: str, x: Tensor, rounded: QuantisedTensor) -> TensorStats:
    """Compare x with what it was rounded to."""
    wide = x.detach().flatten(0, -2).float()
    narrow = rounded.dequantise(torch.float32).view_as(wide)
    amax, nonzero = wide.abs().amax().item() if wide.numel() else 0.0, wide != 0
    codes = rounded.values.float()
    norm = wide.norm().item()
    return TensorStats(
        layer,
        tensor,
        amax,
        saturated=(codes.abs() == LARGEST_E4M3).float().mean().item() if wide.numel() else 0.0,
        underflow=((codes == 0) & nonzero).sum().item() / max(1, int(nonzero.sum())),
        relative_error=(narrow - wide).norm().item() / norm if norm else 0.0,
    )


def weight_stats(layer: str, sums: Sequence[float], *, amax: float, numel: int) -> TensorStats:
    """Of a weight, from the sums that `weights.WeightBlocks.figures` gives of its parts."""
    error, norm, at_limit, vanished, nonzero = sums
    if not math.isfinite(amax):
        amax = error = math.nan
    return TensorStats(
        layer, "weight", amax,
        saturated=at_limit / numel,
        underflow=vanished / max(1.0, nonzero),
        relative_error=math.sqrt(error / norm) if norm else 0.0,
    )  # fmt: skip


@dataclass
class Watch:
    """Shared by the FP8 layers of a rank: what is being sampled, and the first tensor that was not finite."""

    first_non_finite: str | None = None
    _missing: set[tuple[str, str]] | None = None
    _stats: list[TensorStats] = field(default_factory=list)

    def arm(self) -> None:
        """Sample every tensor once from here on."""
        self._missing, self._stats = set(), []

    def take(self) -> list[TensorStats]:
        """What was sampled since `arm`; the sample ends."""
        stats, self._stats, self._missing = self._stats, [], None
        return stats

    def sample(self, layer: str, tensor: str, x: Tensor, quantiser: Quantiser, counts: tuple[int, ...] | None) -> None:
        """Record a tensor that is about to be rounded by `quantiser`, if a sample is due and lacks it."""
        if self._missing is None or (layer, tensor) in self._missing or not x.numel():
            return
        self._missing.add((layer, tensor))
        self._stats.append(tensor_stats(layer, tensor, x, quantiser.quantise(x.detach(), counts)))

    def check_rounded(self, layer: str, tensor: str, rounded: QuantisedTensor | Operand) -> None:
        """As `check`, of what a product is about to read."""
        scales = rounded.scales if isinstance(rounded, QuantisedTensor) else rounded.tile_scales
        if scales is not None:
            self.check(layer, tensor, scales)

    def check(self, layer: str, tensor: str, scales: Tensor) -> None:
        """Remember the first tensor with NaN or infinity, from the scales of its tiles."""
        if self.first_non_finite is None:
            bad = scales == NAN_EXPONENT if scales.dtype == torch.uint8 else scales.isnan()
            if bad.any():
                row, column = bad.nonzero()[0].tolist()
                self.first_non_finite = f"{tensor} of {layer} (tile {row}, {column})"


def worst(samples: Iterable[Iterable[TensorStats]]) -> list[TensorStats]:
    """One row for each tensor from the samples of several ranks: the largest of every figure."""
    found: dict[tuple[str, str], TensorStats] = {}
    for stats in (row for sample in samples for row in sample):
        key = stats.layer, stats.tensor
        found[key] = stats if key not in found else _larger(found[key], stats)
    return list(found.values())


def _larger(a: TensorStats, b: TensorStats) -> TensorStats:
    names = ("amax", "saturated", "underflow", "relative_error")
    # `not <=`: NaN counts as the larger
    figures: dict[str, Any] = {
        name: getattr(b, name) if not getattr(b, name) <= getattr(a, name) else getattr(a, name) for name in names
    }
    return TensorStats(a.layer, a.tensor, **figures)
