"""The plain form of `rows.py`, in torch: what the kernels must equal, bit for bit. Arguments are checked there."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8.formats import QuantisedTensor, Rows, Tile
from model.fp8.quantise import Quantiser


def gather(x_TD: Tensor, source_R: Tensor) -> Tensor:
    """See `rows.gather`."""
    return x_TD.index_select(0, source_R)


def quantise(x_RD: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    """See `rows.quantise`: the model's own quantiser."""
    quantised = Quantiser(Tile.ROW, amax_floor=amax_floor).quantise(x_RD)
    return quantised.values, quantised.scales


def dequantise(values_RD: Tensor, exponents_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """See `rows.dequantise`."""
    tensor = QuantisedTensor(values_RD, exponents_RG, Tile.ROW, Rows.of((len(values_RD),)), tuple(values_RD.shape))
    return tensor.dequantise(dtype)


def combine(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """See `rows.combine`."""
    sum_TD = torch.zeros(len(row_TK), rows_RD.shape[1], dtype=torch.float32, device=rows_RD.device)
    rows_RD = F.pad(rows_RD, (0, 0, 0, 1))  # the row that -1 stands for
    for k in range(row_TK.shape[1]):
        term_TD = rows_RD[row_TK[:, k]].float()
        if weights_TK is not None:
            unused_T = row_TK[:, k] < 0
            term_TD = term_TD * weights_TK[:, k].masked_fill(unused_T, 0.0).unsqueeze(1)
        sum_TD = sum_TD + term_TD
    return sum_TD.to(torch.bfloat16)
