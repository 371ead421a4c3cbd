"""A weight's rounding in 128x128 blocks when every rank has only a stretch of its FP32 master.

A block's scale comes from its largest magnitude, which may lie on another rank: each rank finds what its stretch has of
every block, the maxima are reduced, and each rounds its own numbers with the scales of all. The bytes are those of
`Quantiser.quantise` on the whole weight, wherever it is cut.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.fp8.formats import LARGEST_E4M3, QuantisedTensor, Rows, Scales, Tile, exponents_to_scales, scale_shape
from model.fp8.quantise import Quantiser, exponents_of, scales_of


def no_numbers(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a parameter is given whose layer reads it elsewhere: one NaN spread over its shape.

    Whoever reads the parameter's own numbers all the same finds out.
    """
    return torch.full((), torch.nan, dtype=dtype, device=weight.device).expand(weight.shape)


@dataclass(frozen=True)
class WeightBlocks:
    """The blocks of one weight; they do not cross the matrices of a stack.

    shape: [out, in] or [groups, out, in]. quantiser: of 128x128 tiles.
    """

    shape: tuple[int, ...]
    quantiser: Quantiser

    def __post_init__(self) -> None:
        if self.quantiser.tile is not Tile.BLOCK:
            raise ValueError(f"weights are rounded in 128x128 blocks, not in {self.quantiser.tile.value}")

    @cached_property
    def rows(self) -> Rows:
        """Rows of all matrices, one below the other."""
        return Rows.of((self.shape[-2],) * (self.shape[0] if len(self.shape) == 3 else 1))

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Of the scales, [blocks of rows, strips of 128 columns]."""
        return scale_shape(Tile.BLOCK, self.rows, self.shape[-1])

    @property
    def scale_dtype(self) -> torch.dtype:
        """One-byte exponents, or FP32."""
        return torch.uint8 if self.quantiser.scales is Scales.POWER_OF_TWO else torch.float32

    def amax(self, part: Tensor, start: int) -> Tensor:
        """Largest magnitudes that part, FP32 elements `start` on of the flat weight, has of every block.

        FP32, shape `scale_shape`; 0 for a block of which it has nothing, infinity for one with NaN or infinity: a
        maximum over ranks keeps that.
        """
        return self.quantiser.kernels.amax_of_part(part, start, self.rows, self.shape[-1])

    def scales(self, amax: Tensor) -> Tensor:
        """The scales as stored, from the largest magnitudes of whole blocks."""
        scales = scales_of(amax, largest=LARGEST_E4M3, floor=self.quantiser.amax_floor)
        return exponents_of(scales) if self.scale_dtype is torch.uint8 else scales

    def encode(self, part: Tensor, start: int, scales: Tensor) -> Tensor:
        """E4M3 of part, FP32 elements `start` on of the flat weight, with the stored scales of all blocks."""
        return self.quantiser.kernels.encode_part(part, start, self.rows, self.shape[-1], scales)

    def quantise(self, weight: Tensor) -> QuantisedTensor:
        """A weight that is all here, BF16 or FP32."""
        return self.quantiser.quantise(weight.detach(), self.rows.counts)

    def whole(self, values: Tensor, scales: Tensor) -> QuantisedTensor:
        """The weight, of all its flat E4M3 values and its scales; no memory of its own."""
        matrix = values.view(-1, self.shape[-1])
        return QuantisedTensor(matrix, scales.view(self.scale_shape), Tile.BLOCK, self.rows, self.shape)

    def figures(self, part: Tensor, start: int, values: Tensor, scales: Tensor) -> Tensor:
        """What `watch.weight_stats` needs of a part and what it was rounded to; FP64 sums that add up over parts.

        Squared error, squared norm, numbers at 448, non-zero numbers that became zero, non-zero numbers.
        """
        wide = exponents_to_scales(scales) if scales.dtype is torch.uint8 else scales
        at = torch.arange(start, start + len(part), device=part.device)
        block = self.rows.block_of_row.to(part.device)[at // self.shape[-1]]
        codes, part = values.float(), part.float()
        rounded = codes * wide.view(self.scale_shape)[block, at % self.shape[-1] // Tile.BLOCK.value[1]]
        nonzero = part != 0
        sums = (
            (rounded - part).double().square().sum(), part.double().square().sum(),
            (codes.abs() == LARGEST_E4M3).sum(), ((codes == 0) & nonzero).sum(), nonzero.sum(),
        )  # fmt: skip
        return torch.stack([value.double() for value in sums])
