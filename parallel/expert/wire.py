"""What a row looks like while it travels: in its own type, rounded to BF16, or as FP8 with exponents of one byte.

FP8: E4M3 values, and for each tile of 1 x 128 columns one byte e that stands for the power of two 2^(e - 127), which
is how the report dispatches (7168 columns: 7168 + 56 bytes). The sender quantises, the receiver multiplies out into the
model's type; that product is exact in BF16 and in FP32, so what arrives does not depend on the way it took.
"""

import torch
from torch import Tensor

from model.fp8.formats import QuantisedTensor, Rows, Tile, num_strips
from model.fp8.quantise import Quantiser
from parallel.expert.transfer import Parcel

WIRES = ("model", "bf16", "fp32", "fp8")
QUANTISER = Quantiser(Tile.ROW)  # power-of-two scales, amax floor 1e-4
# The floor would flush the small gradients of large batches to zero.
GRADIENT_QUANTISER = Quantiser(Tile.ROW, amax_floor=0.0)


def as_bytes(x_NK: Tensor) -> Tensor:
    """Values as bytes: uint8 [N, K * size]."""
    return _canonical(x_NK).view(torch.uint8)


def from_bytes(bytes_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `as_bytes`, of a part of the columns if need be."""
    if not bytes_NB.numel():
        return bytes_NB.new_empty(len(bytes_NB), bytes_NB.shape[1] // dtype.itemsize, dtype=dtype)
    return _canonical(bytes_NB).view(dtype)


def _canonical(x_NK: Tensor) -> Tensor:
    """Contiguous, by strides and alignment too: with one row or column a tensor counts as such whatever they are."""
    if x_NK.stride() == (x_NK.shape[1], 1) and x_NK.storage_offset() == 0:
        return x_NK
    return torch.empty_like(x_NK, memory_format=torch.contiguous_format).copy_(x_NK)


def row_bytes(hidden: int, *, wire: str, dtype: torch.dtype) -> int:
    """Bytes of the payload of one row."""
    if wire == "fp8":
        return hidden + num_strips(hidden)
    return hidden * wire_dtype(wire, dtype).itemsize


def wire_dtype(wire: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a row of `dtype` travels, where that is a plain type."""
    return {"model": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[wire]


def encode(x_TD: Tensor | QuantisedTensor, wire: str, quantiser: Quantiser = QUANTISER) -> Parcel:
    """Rows as they travel. Raises ValueError for a quantised tensor that the wire is not made for."""
    if isinstance(x_TD, Tensor) and wire != "fp8":
        return Parcel(x_TD.to(wire_dtype(wire, x_TD.dtype)))
    tensor = quantiser.quantise(x_TD) if isinstance(x_TD, Tensor) else x_TD
    if wire != "fp8" or tensor.tile is not Tile.ROW or not tensor.power_of_two:
        raise ValueError(
            f"a tensor in tiles of {tensor.tile.value} with scales of {tensor.scales.dtype} does not travel as {wire}: "
            f"only tiles of {Tile.ROW.value} with one-byte exponents do, as fp8"
        )
    # Collectives know no FP8: its bytes travel.
    return Parcel(as_bytes(tensor.values), tensor.scales)


def decode(parcel: Parcel, wire: str, dtype: torch.dtype, quantiser: Quantiser = QUANTISER) -> Tensor:
    """Rows that arrived, in the model's type: [N, D]."""
    if wire != "fp8":
        return parcel.rows_ND.to(dtype)
    assert parcel.extra_NB is not None
    values = parcel.rows_ND.view(torch.float8_e4m3fn)
    rows, shape = Rows.of((len(values),)), tuple(values.shape)
    exponents = parcel.extra_NB.contiguous()
    return quantiser.kernels.decode(QuantisedTensor(values, exponents, Tile.ROW, rows, shape), dtype)
