"""FP8 rows as the kernels carry them: E4M3 values, then one exponent byte for each 1x128 tile, then zeros."""

import torch
from torch import Tensor

from model.fp8.formats import QuantisedTensor, num_strips
from model.fp8.quantise import Quantiser
from parallel.expert.transfer import Parcel
from parallel.expert.wire import QUANTISER, decode, encode


def packed_bytes(hidden: int) -> int:
    """Bytes of a packed row, a multiple of 16."""
    return -(-(hidden + num_strips(hidden)) // 16) * 16


def pack(x_TD: Tensor | QuantisedTensor, quantiser: Quantiser = QUANTISER) -> Tensor:
    """[T, D] -> uint8 [T, packed_bytes(D)], quantised as `parallel.expert.wire` does."""
    parcel = encode(x_TD, "fp8", quantiser)
    values, exponents = parcel.rows_ND, parcel.extra_NB
    assert exponents is not None
    hidden, tiles = values.shape[1], exponents.shape[1]
    packed = values.new_zeros(len(values), packed_bytes(hidden))
    packed[:, :hidden], packed[:, hidden : hidden + tiles] = values, exponents
    return packed


def unpack(packed: Tensor, *, hidden: int, dtype: torch.dtype) -> Tensor:
    """The rows that `pack` made, [R, D]."""
    exponents = packed[:, hidden : hidden + num_strips(hidden)].contiguous()
    return decode(Parcel(packed[:, :hidden].contiguous(), exponents), "fp8", dtype)
