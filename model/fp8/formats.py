"""What a tensor quantised in blocks is: E4M3 bytes, one scale for every tile, and which numbers share a tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

import torch
from torch import Tensor

TILE_SIZE = 128
# The CPU's BF16 product compiles a kernel for every new shape; experts' row counts rounded up to this recur.
PADDED_ROWS = 64
LARGEST_E4M3 = 448.0
# The released kernel's floor of a tile's largest magnitude; below it a tile shares the scale of 1e-4.
AMAX_FLOOR = 1e-4
EXPONENT_BIAS = 127  # a one-byte exponent stands for 2^(byte - 127), as in OCP's E8M0; 255 is NaN
NAN_EXPONENT = 255


class Tile(Enum):
    """Which numbers share a scale, as (rows, columns). Tiles at the edges are smaller, with a scale of their own."""

    ROW = (1, TILE_SIZE)
    COLUMN = (TILE_SIZE, 1)
    BLOCK = (TILE_SIZE, TILE_SIZE)


class Scales(Enum):
    """FP32: amax / 448. POWER_OF_TWO: that rounded up to a power of two and stored as one byte."""

    FP32 = "fp32"
    POWER_OF_TWO = "power_of_two"


@dataclass(frozen=True)
class Rows:
    """Rows cut in blocks of at most 128, anew in every group (an expert's rows, a weight matrix of a stack).

    counts: rows of each group. bounds: block b is rows bounds[b] to bounds[b + 1].
    """

    counts: tuple[int, ...]
    bounds: tuple[int, ...]

    @staticmethod
    def of(counts: tuple[int, ...]) -> Rows:
        """Blocks of groups of counts[g] rows."""
        bounds, start = [0], 0
        for count in counts:
            bounds += [start + stop for stop in (*range(TILE_SIZE, count, TILE_SIZE), count) if count]
            start += count
        return Rows(counts, tuple(bounds))

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return self.bounds[-1]

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self.bounds) - 1

    @property
    def lengths(self) -> list[int]:
        """Rows of each block."""
        return [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def padded_starts(self) -> list[int]:
        """First row of every group in a padded layout, and at the end the number of rows."""
        return [0, *accumulate(-(-count // PADDED_ROWS) * PADDED_ROWS for count in self.counts)]

    @property
    def padded_blocks(self) -> list[int]:
        """First row of every block in a padded layout."""
        groups = zip(self.padded_starts, self.counts, strict=False)
        return [start + row for start, count in groups for row in range(0, count, TILE_SIZE)]

    @property
    def block_of_row(self) -> Tensor:
        """The block of each row, int64."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.arange(self.num_blocks).repeat_interleave(lengths)


class Layout(Enum):
    """How an operand's numbers lie in memory.

    PLAIN: [rows, columns]. PADDED: every group's rows filled up with zero rows to a multiple of PADDED_ROWS, so that
    products of few different shapes occur. TURNED: padded and transposed, [columns, padded rows].
    """

    PLAIN = "plain"
    PADDED = "padded"
    TURNED = "turned"


def num_strips(num_columns: int) -> int:
    """Strips of 128 columns, the last maybe narrower."""
    return -(-num_columns // TILE_SIZE)


def scale_shape(tile: Tile, rows: Rows, num_columns: int) -> tuple[int, int]:
    """Shape of the scales of a matrix of these rows and columns."""
    return (
        rows.num_rows if tile is Tile.ROW else rows.num_blocks,
        num_columns if tile is Tile.COLUMN else num_strips(num_columns),
    )


def exponents_to_scales(exponents: Tensor) -> Tensor:
    """One-byte exponents -> FP32 powers of two, made from their bits; 255 gives NaN."""
    wide = exponents.to(torch.int32)
    bits = torch.where(wide == 0, 1 << 22, wide << 23).masked_fill_(wide == NAN_EXPONENT, 0x7FC00000)
    return bits.view(torch.float32)


def spread(scales: Tensor, tile: Tile, rows: Rows, num_columns: int) -> Tensor:
    """Scales of the tiles -> one for each number, [rows, num_columns]."""
    if tile is not Tile.COLUMN:
        scales = scales.repeat_interleave(TILE_SIZE, dim=1)[:, :num_columns]
    if tile is not Tile.ROW:
        scales = scales[rows.block_of_row]
    return scales


@dataclass(frozen=True)
class QuantisedTensor:
    """A tensor in E4M3 with a scale for every tile.

    values: float8_e4m3fn [rows, columns]. scales: FP32, or uint8 exponents (2^(byte - 127), 255 NaN), shape
    `scale_shape(tile, rows, columns)`. shape: of the original, whose leading dimensions are flattened to rows.
    """

    values: Tensor
    scales: Tensor
    tile: Tile
    rows: Rows
    shape: tuple[int, ...]

    @property
    def power_of_two(self) -> bool:
        """Whether the scales are exponents."""
        return self.scales.dtype == torch.uint8

    @property
    def wide_scales(self) -> Tensor:
        """The scales in FP32."""
        return exponents_to_scales(self.scales) if self.power_of_two else self.scales

    @property
    def num_bytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def groups(self) -> Iterator[QuantisedTensor]:
        """Every group's rows as a tensor of its own."""
        row = block = 0
        for count in self.rows.counts:
            rows, columns = Rows.of((count,)), self.values.shape[1]
            start, length = (row, count) if self.tile is Tile.ROW else (block, rows.num_blocks)
            scales = self.scales[start : start + length]
            yield QuantisedTensor(self.values[row : row + count], scales, self.tile, rows, (count, columns))
            row, block = row + count, block + rows.num_blocks

    def dequantise(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Values times scales, computed in FP32 and rounded to `dtype`, in the original shape.

        With power-of-two scales BF16 is exact, but for magnitudes above BF16's largest, which become infinite.
        """
        scales = spread(self.wide_scales, self.tile, self.rows, self.values.shape[1])
        return (self.values.float() * scales).to(dtype).view(self.shape)


@dataclass(frozen=True)
class Operand:
    """A rounded matrix in the form that a BF16 product reads: what the tensor core would see.

    values: BF16 [rows, columns] in the layout; already times the scales where they are powers of two (exact), the bare
    E4M3 values otherwise, and then `scales` holds the FP32 scales. tile_scales: of either kind, as a QuantisedTensor
    has them, where the operand was rounded just now: a tile that was not finite shows there.
    """

    values: Tensor
    scales: Tensor | None
    tile: Tile
    rows: Rows
    layout: Layout = Layout.PLAIN
    tile_scales: Tensor | None = None
