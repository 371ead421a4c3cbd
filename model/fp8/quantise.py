"""The quantisers: 1x128, 128x1 and 128x128 tiles to E4M3, as one interface over two sets of kernels.

`TorchKernels` is the definition, in plain torch; `native.NativeKernels` computes the same bits in one pass.

    amax = max |x| over the tile, at least the floor     scale = amax / 448 in FP32
    power of two: 2^ceil(log2 scale), from the bits      value = E4M3(x / scale), nearest even, saturating

as the released act_quant kernel does. Beyond it: a floor of 0 gives an all-zero tile the scale 1; no scale is below
2^-126; a tile with NaN or infinity becomes NaN throughout, scale and values (the released kernel would turn its other
numbers into zeros, torch's cast infinity into 448).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from model.fp8.formats import (
    AMAX_FLOOR,
    LARGEST_E4M3,
    NAN_EXPONENT,
    TILE_SIZE,
    Layout,
    Operand,
    QuantisedTensor,
    Rows,
    Scales,
    Tile,
    exponents_to_scales,
    num_strips,
    spread,
)

SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Encoded:
    """What kernels return: E4M3 bytes and BF16 numbers (either None if not asked for), and the tiles' scales."""

    values: Tensor | None
    wide: Tensor | None
    scales: Tensor


@dataclass(frozen=True)
class Request:
    """What to compute: tile and scales, the amax floor, and which of the two outputs."""

    tile: Tile
    scales: Scales
    amax_floor: float
    values: bool
    wide: bool
    layout: Layout = Layout.PLAIN  # of the BF16 numbers


class Kernels(Protocol):
    """Computes quantisation on matrices; every implementation gives the same bits."""

    def encode(self, x: Tensor, rows: Rows, request: Request) -> Encoded:
        """x [rows, columns] BF16 or FP32 to what the request says."""
        ...

    def recode(self, tensor: QuantisedTensor, request: Request) -> Encoded:
        """A quantised tensor dequantised (in FP32 where its scales are) and encoded again."""
        ...

    def decode(self, tensor: QuantisedTensor, dtype: torch.dtype) -> Tensor:
        """Values times scales in BF16 or FP32, [rows, columns]."""
        ...

    def amax_of_part(self, part: Tensor, start: int, rows: Rows, num_columns: int) -> Tensor:
        """See `weights.WeightBlocks.amax`."""
        ...

    def encode_part(self, part: Tensor, start: int, rows: Rows, num_columns: int, scales: Tensor) -> Tensor:
        """See `weights.WeightBlocks.encode`."""
        ...


def tile_amax(x: Tensor, tile: Tile, rows: Rows) -> Tensor:
    """Largest magnitude of every tile in FP32; NaN where the tile has one."""
    amax = x.float().abs()
    if tile is not Tile.ROW:
        blocks = [part.amax(0) for part in amax.split(rows.lengths)] if rows.num_blocks else []
        amax = torch.stack(blocks) if blocks else amax[:0]
    if tile is not Tile.COLUMN:
        padding = -x.shape[1] % TILE_SIZE
        amax = torch.nn.functional.pad(amax, (0, padding)).view(len(amax), num_strips(x.shape[1]), TILE_SIZE).amax(2)
    return amax


def scales_of(amax: Tensor, *, largest: float, floor: float) -> Tensor:
    """FP32 scales amax / largest with the floor; 1 for amax 0 without a floor; NaN where amax is not finite."""
    amax = torch.where(amax.isinf(), torch.nan, amax)
    scales = (amax.clamp(min=floor) / torch.tensor(largest)).clamp(min=SMALLEST_SCALE)
    return torch.where(amax.clamp(min=floor) == 0, 1.0, scales)


def exponents_of(scales: Tensor) -> Tensor:
    """The exponent byte of the smallest power of two that is not below each scale, from its bits; 255 for NaN."""
    exponents = (scales.view(torch.int32) + 0x7FFFFF) >> 23
    return exponents.masked_fill(scales.isnan(), NAN_EXPONENT).to(torch.uint8)


def laid_out(wide: Tensor, rows: Rows, layout: Layout) -> Tensor:
    """[rows, columns] in the layout."""
    if layout is Layout.PLAIN:
        return wide
    padded = wide.new_zeros(rows.padded_starts[-1], wide.shape[1])
    for part, start in zip(wide.split(rows.counts), rows.padded_starts, strict=False):
        padded[start : start + len(part)] = part
    return padded.t().contiguous() if layout is Layout.TURNED else padded


def wide_dtype(tensor: QuantisedTensor) -> torch.dtype:
    """The narrower of BF16 and FP32 that holds every value exactly, or (FP32 scales) as well as can be."""
    return torch.bfloat16 if tensor.power_of_two else torch.float32


class TorchKernels:
    """The definition in plain torch."""

    def encode(self, x: Tensor, rows: Rows, request: Request) -> Encoded:
        """See Kernels."""
        scales = scales_of(tile_amax(x, request.tile, rows), largest=LARGEST_E4M3, floor=request.amax_floor)
        stored = scales
        if request.scales is Scales.POWER_OF_TWO:
            stored = exponents_of(scales)
            scales = exponents_to_scales(stored)
        wide_scales = spread(scales, request.tile, rows, x.shape[1])
        values = e4m3(x, wide_scales)
        wide = None
        if request.wide:
            wide = values.float() * wide_scales if request.scales is Scales.POWER_OF_TWO else values
            wide = laid_out(wide.to(torch.bfloat16), rows, request.layout)
        return Encoded(values if request.values else None, wide, stored)

    def recode(self, tensor: QuantisedTensor, request: Request) -> Encoded:
        """See Kernels."""
        return self.encode(self.decode(tensor, wide_dtype(tensor)), tensor.rows, request)

    def decode(self, tensor: QuantisedTensor, dtype: torch.dtype) -> Tensor:
        """See Kernels."""
        return tensor.dequantise(dtype).view(tensor.values.shape)

    def amax_of_part(self, part: Tensor, start: int, rows: Rows, num_columns: int) -> Tensor:
        """See Kernels."""
        amax = torch.zeros(rows.num_blocks, num_strips(num_columns), device=part.device)
        if len(part):
            cut = _Cut.of(start, len(part), rows, num_columns)
            found = tile_amax(cut.filled_up(part), Tile.BLOCK, cut.rows)
            amax[cut.blocks] = torch.where(found.isfinite(), found, torch.inf)
        return amax

    def encode_part(self, part: Tensor, start: int, rows: Rows, num_columns: int, scales: Tensor) -> Tensor:
        """See Kernels."""
        if not len(part):
            return torch.empty(0, dtype=torch.float8_e4m3fn, device=part.device)
        cut = _Cut.of(start, len(part), rows, num_columns)
        wide = exponents_to_scales(scales) if scales.dtype == torch.uint8 else scales
        values = e4m3(cut.filled_up(part), spread(wide[cut.blocks], Tile.BLOCK, cut.rows, num_columns))
        return values.flatten()[cut.before : cut.before + len(part)]


def e4m3(x: Tensor, scales: Tensor) -> Tensor:
    """x over the scale of each number, in E4M3; NaN without a sign."""
    scaled = x.float() / scales
    return torch.where(scaled.isnan(), torch.nan, scaled).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class _Cut:
    """A stretch of a matrix's flat elements, filled up to whole rows.

    before, after: elements that fill up. rows: of those, in blocks as far as they reach; blocks: which of all.
    """

    before: int
    after: int
    rows: Rows
    blocks: slice

    @staticmethod
    def of(start: int, length: int, rows: Rows, num_columns: int) -> _Cut:
        first, stop = start // num_columns, -(-(start + length) // num_columns)
        low, high = bisect_right(rows.bounds, first) - 1, bisect_left(rows.bounds, stop)
        bounds = (first, *rows.bounds[low + 1 : high], stop)
        own = Rows((stop - first,), tuple(row - first for row in bounds))
        return _Cut(start - first * num_columns, stop * num_columns - start - length, own, slice(low, high))

    def filled_up(self, part: Tensor) -> Tensor:
        """[rows, columns], zeros around the part."""
        return torch.nn.functional.pad(part, (self.before, self.after)).view(self.rows.num_rows, -1)


@dataclass(frozen=True)
class Quantiser:
    """Rounds tensors to E4M3 in tiles.

    tile, scales: which numbers share a scale, and its format. amax_floor: 1e-4 as the released kernel has, 0 for
    gradients smaller than that (an all-zero tile then has the scale 1). layout: of operands.
    """

    tile: Tile
    scales: Scales = Scales.POWER_OF_TWO
    amax_floor: float = AMAX_FLOOR
    kernels: Kernels = field(default_factory=TorchKernels)
    layout: Layout = Layout.PLAIN

    def __post_init__(self) -> None:
        if self.layout is Layout.TURNED and self.tile is not Tile.COLUMN:
            raise ValueError(f"only 128x1 tiles are stored transposed, not {self.tile.name}")

    def quantise(self, x: Tensor, counts: tuple[int, ...] | None = None) -> QuantisedTensor:
        """x [..., columns], BF16 or FP32, leading dimensions flattened to rows.

        counts: rows of each group; tiles of 128 rows start anew at every group. One group where it is not given.
        A tile with NaN or infinity becomes NaN; `watch.Watch.check` finds it by its scale.
        """
        matrix, rows = _matrix(x, counts)
        encoded = self.kernels.encode(matrix, rows, self._request(values=True))
        assert encoded.values is not None
        return QuantisedTensor(encoded.values, encoded.scales, self.tile, rows, tuple(x.shape))

    def operand(self, x: Tensor, counts: tuple[int, ...] | None = None) -> Operand:
        """As `quantise`, but the rounded numbers in BF16 for a product; the bytes are never made."""
        matrix, rows = _matrix(x, counts)
        return self._operand(self.kernels.encode(matrix, rows, self._request(wide=True)), rows)

    def both(self, x: Tensor, counts: tuple[int, ...] | None = None) -> tuple[QuantisedTensor, Operand]:
        """`quantise` and `operand` in one pass."""
        matrix, rows = _matrix(x, counts)
        encoded = self.kernels.encode(matrix, rows, self._request(values=True, wide=True))
        assert encoded.values is not None
        tensor = QuantisedTensor(encoded.values, encoded.scales, self.tile, rows, tuple(x.shape))
        return tensor, self._operand(encoded, rows)

    def as_operand(self, tensor: QuantisedTensor) -> Operand:
        """The operand of a tensor that is already in this quantiser's tiles."""
        if tensor.power_of_two:
            wide, scales = self.kernels.decode(tensor, torch.bfloat16), None
        else:
            wide, scales = tensor.values.to(torch.bfloat16), tensor.scales
        return Operand(laid_out(wide, tensor.rows, self.layout), scales, tensor.tile, tensor.rows, self.layout)

    def widen(self, tensor: QuantisedTensor) -> Tensor:
        """Dequantised [rows, columns] without rounding to BF16 where that would lose bits (FP32 scales)."""
        return self.kernels.decode(tensor, wide_dtype(tensor))

    def requantise(self, tensor: QuantisedTensor) -> QuantisedTensor:
        """The same numbers in this quantiser's tiles: the report's 1x128 to 128x1 conversion for the weight gradient.

        With power-of-two scales on both sides a number changes only if it is not a multiple of 2^-9 times its new
        scale: a number below 2^-6 of that scale whose four significant bits reach further down (underflow). With
        FP32 scales every number is rounded a second time.
        """
        encoded = self.kernels.recode(tensor, self._request(values=True))
        assert encoded.values is not None
        return QuantisedTensor(encoded.values, encoded.scales, self.tile, tensor.rows, tensor.shape)

    def requantised_operand(self, tensor: QuantisedTensor) -> Operand:
        """As `requantise`, but the operand; nothing is written in between."""
        return self._operand(self.kernels.recode(tensor, self._request(wide=True)), tensor.rows)

    def _request(self, *, values: bool = False, wide: bool = False) -> Request:
        return Request(self.tile, self.scales, self.amax_floor, values, wide, self.layout)

    def _operand(self, encoded: Encoded, rows: Rows) -> Operand:
        assert encoded.wide is not None
        scales = encoded.scales if self.scales is Scales.FP32 else None
        return Operand(encoded.wide, scales, self.tile, rows, self.layout, encoded.scales)


def _matrix(x: Tensor, counts: tuple[int, ...] | None) -> tuple[Tensor, Rows]:
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"quantise takes bfloat16 or float32, not {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"quantise takes [..., rows, columns], not the shape {tuple(x.shape)}")
    matrix = x.flatten(0, -2)
    if counts is not None and sum(counts) != len(matrix):
        raise ValueError(f"groups of {sum(counts)} rows in all do not fit {len(matrix)} rows of shape {tuple(x.shape)}")
    return matrix, Rows.of((len(matrix),) if counts is None else counts)
