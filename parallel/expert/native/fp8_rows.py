"""Rows as FP8 bytes for the way to the experts: E4M3 and one power-of-two exponent byte for each tile of 128 values."""

import torch
from torch import Tensor

TILE, LARGEST, BIAS = 128, 448.0, 127


def packed_bytes(hidden: int) -> int:
    """Bytes of a packed row, a multiple of 16."""
    return -(-(hidden + -(-hidden // TILE)) // 16) * 16


def pack(x_TD: Tensor) -> Tensor:
    """[T, D] -> uint8 [T, packed_bytes(D)]: D bytes of E4M3, then D / 128 of exponents (biased by 127), then zeros.

    The scale of a tile is the least power of two for which its largest value fits (448). Infinities and NaN become NaN.
    """
    tokens, hidden = x_TD.shape
    tiles = -(-hidden // TILE)
    padded = torch.nn.functional.pad(x_TD.float(), (0, tiles * TILE - hidden)).view(tokens, tiles, TILE)
    largest = padded.abs().amax(2)
    exponent = torch.frexp(largest / LARGEST).exponent
    exponent -= (torch.ldexp(torch.full_like(largest, LARGEST / 2), exponent) >= largest).to(exponent.dtype)
    exponent = torch.where(largest > 0, exponent, 0).clamp(-BIAS, BIAS)
    scaled = torch.ldexp(padded, -exponent[..., None])
    finite = torch.isfinite(padded)
    quantised = torch.where(finite, scaled, torch.nan).to(torch.float8_e4m3fn).view(torch.uint8)
    packed = x_TD.new_zeros(tokens, packed_bytes(hidden), dtype=torch.uint8)
    packed[:, :hidden] = quantised.view(tokens, tiles * TILE)[:, :hidden]
    packed[:, hidden : hidden + tiles] = (exponent + BIAS).to(torch.uint8)
    return packed


def unpack(packed: Tensor, *, hidden: int, dtype: torch.dtype) -> Tensor:
    """The rows that `pack` made, [R, D]; exact in BF16 and FP32."""
    tiles = -(-hidden // TILE)
    values = packed[:, :hidden].contiguous().view(torch.float8_e4m3fn).float()
    exponent = packed[:, hidden : hidden + tiles].int() - BIAS
    return torch.ldexp(values, exponent.repeat_interleave(TILE, 1)[:, :hidden]).to(dtype)
