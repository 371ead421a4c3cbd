"""E5M6: the 12-bit float in which the attention's output is kept for the backward of the linear after it.

The report names the format (3.3.3) and not its details. Here: sign, five exponent bits with bias 15, six of mantissa,
with subnormals; the largest exponent is left out, so every number is an FP16 number whose last four bits are zero
(largest 65024, smallest 2^-20). Tiles of 1x128 with power-of-two scales 2^ceil(log2(amax / 65024)), one byte each.

Storage, 12.06 bits a number: the upper eight bits of every number in one plane, the lower four packed in a second,
where the first half of a tile's numbers have the low nibbles and the second half the high ones.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.fp8.formats import (
    AMAX_FLOOR,
    TILE_SIZE,
    Rows,
    Tile,
    exponents_to_scales,
    num_strips,
    spread,
)
from model.fp8.quantise import exponents_of, scales_of, tile_amax

LARGEST_E5M6 = 65024.0


@dataclass(frozen=True)
class E5M6Tensor:
    """high: uint8 [rows, columns]. low: uint8 [rows, (columns + 1) // 2]. exponents: uint8 [rows, strips]."""

    high: Tensor
    low: Tensor
    exponents: Tensor
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of both planes and the exponents."""
        return self.high.nbytes + self.low.nbytes + self.exponents.nbytes


class E5M6Kernels(Protocol):
    """Computes the format; every implementation gives the same bits."""

    def encode_e5m6(self, x: Tensor, high: Tensor, low: Tensor, exponents: Tensor, *, amax_floor: float) -> None:
        """Fill the three planes from x [rows, columns]."""
        ...

    def decode_e5m6(self, high: Tensor, low: Tensor, exponents: Tensor) -> Tensor:
        """BF16 [rows, columns]."""
        ...


class TorchE5M6:
    """The definition in plain torch."""

    def encode_e5m6(self, x: Tensor, high: Tensor, low: Tensor, exponents: Tensor, *, amax_floor: float) -> None:
        """See E5M6Kernels."""
        rows = Rows.of((len(x),))
        exponents.copy_(exponents_of(scales_of(tile_amax(x, Tile.ROW, rows), largest=LARGEST_E5M6, floor=amax_floor)))
        scaled = x.float() / spread(exponents_to_scales(exponents), Tile.ROW, rows, x.shape[1])
        # The step of the last kept bit: seven significant bits, and not below 2^-20.
        step = torch.exp2((torch.frexp(scaled).exponent - 7).clamp(min=-20).float())
        rounded = ((scaled / step).round() * step).clamp(-LARGEST_E5M6, LARGEST_E5M6)
        rounded = torch.copysign(torch.where(scaled.isfinite(), rounded, 0.0), scaled).masked_fill(scaled.isnan(), 0.0)
        codes = (rounded.half().view(torch.int16) >> 4) & 0xFFF
        high.copy_(codes >> 4)
        low.copy_(_pack((codes & 15).to(torch.uint8)))

    def decode_e5m6(self, high: Tensor, low: Tensor, exponents: Tensor) -> Tensor:
        """See E5M6Kernels."""
        codes = (high.to(torch.int16) << 4) | _unpack(low, high.shape[1]).to(torch.int16)
        values = (codes << 4).view(torch.float16).float()
        scales = spread(exponents_to_scales(exponents), Tile.ROW, Rows.of((len(high),)), high.shape[1])
        return (values * scales).to(torch.bfloat16)


def _halves(num_columns: int) -> list[tuple[int, int, int]]:
    """Of every tile: its first column, its number of columns, how many of them have the low nibbles."""
    widths = [(col, min(TILE_SIZE, num_columns - col)) for col in range(0, num_columns, TILE_SIZE)]
    return [(col, width, (width + 1) // 2) for col, width in widths]


def _pack(nibbles: Tensor) -> Tensor:
    packed = nibbles.new_zeros(len(nibbles), (nibbles.shape[1] + 1) // 2)
    for col, width, half in _halves(nibbles.shape[1]):
        packed[:, col // 2 : col // 2 + half] = nibbles[:, col : col + half]
        packed[:, col // 2 : col // 2 + width - half] |= nibbles[:, col + half : col + width] << 4
    return packed


def _unpack(packed: Tensor, num_columns: int) -> Tensor:
    nibbles = packed.new_empty(len(packed), num_columns)
    for col, width, half in _halves(num_columns):
        nibbles[:, col : col + half] = packed[:, col // 2 : col // 2 + half] & 15
        nibbles[:, col + half : col + width] = packed[:, col // 2 : col // 2 + width - half] >> 4
    return nibbles


def quantise_e5m6(x: Tensor, kernels: E5M6Kernels | None = None, *, amax_floor: float = AMAX_FLOOR) -> E5M6Tensor:
    """x [..., columns], BF16 or FP32. A tile with NaN or infinity becomes NaN throughout."""
    matrix = x.flatten(0, -2)
    num_rows, num_columns = matrix.shape
    widths = (num_columns, (num_columns + 1) // 2, num_strips(num_columns))
    high, low, exponents = (torch.empty(num_rows, width, dtype=torch.uint8, device=x.device) for width in widths)
    (kernels or TorchE5M6()).encode_e5m6(matrix, high, low, exponents, amax_floor=amax_floor)
    return E5M6Tensor(high, low, exponents, tuple(x.shape))


def dequantise_e5m6(tensor: E5M6Tensor, kernels: E5M6Kernels | None = None) -> Tensor:
    """BF16 in the original shape: exact, since seven significant bits and a power of two fit in BF16."""
    kernels = kernels or TorchE5M6()
    return kernels.decode_e5m6(tensor.high, tensor.low, tensor.exponents).view(tensor.shape)
