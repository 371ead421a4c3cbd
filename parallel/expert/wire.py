"""What a row looks like while it travels: in its own type, rounded to BF16, or as FP8 with exponents of one byte.

FP8: E4M3 values, and for each tile of 1 x 128 columns one byte e that stands for the power of two 2^(e - 127), which
is how the report dispatches (7168 columns: 7168 + 56 bytes). The sender quantises, the receiver multiplies out into the
model's type; that product is exact in BF16 and in FP32, so what arrives does not depend on the way it took.
"""

import torch
from torch import Tensor

from parallel.expert.transfer import Parcel

WIRES = ("model", "bf16", "fp32", "fp8")
TILE = 128
EXPONENT_BIAS = 127


def as_bytes(x_NK: Tensor) -> Tensor:
    """Values as bytes: uint8 [N, K * size]."""
    return _canonical(x_NK).view(torch.uint8)


def from_bytes(bytes_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `as_bytes`, of a part of the columns if need be."""
    return _canonical(bytes_NB).view(dtype)


def _canonical(x_NK: Tensor) -> Tensor:
    """Contiguous, by strides and alignment too: with one row or column a tensor counts as such whatever they are."""
    if x_NK.stride() == (x_NK.shape[1], 1) and x_NK.storage_offset() == 0:
        return x_NK
    return torch.empty_like(x_NK, memory_format=torch.contiguous_format).copy_(x_NK)


def num_tiles(hidden: int) -> int:
    """Tiles of a row; the last may be shorter."""
    return -(-hidden // TILE)


def row_bytes(hidden: int, *, wire: str, dtype: torch.dtype) -> int:
    """Bytes of the payload of one row."""
    if wire == "fp8":
        return hidden + num_tiles(hidden)
    return hidden * wire_dtype(wire, dtype).itemsize


def wire_dtype(wire: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a row of `dtype` travels, where that is a plain type."""
    return {"model": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[wire]


def encode(x_TD: Tensor, wire: str) -> Parcel:
    """Rows as they travel."""
    return Parcel(x_TD.to(wire_dtype(wire, x_TD.dtype)))


def decode(parcel: Parcel, wire: str, dtype: torch.dtype) -> Tensor:
    """Rows that arrived, in the model's type."""
    return parcel.rows_ND.to(dtype)
