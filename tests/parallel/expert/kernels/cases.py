"""Inputs that exercise every rounding, and a comparison by bits, for whichever back end runs them."""

import torch
from torch import Tensor

from parallel.expert.kernels import rows

FINITE = 0x7F80  # BF16 patterns from here to 0x7FFF are infinity and NaN


def every_bf16() -> Tensor:
    """All finite BF16 values, [510, 128], in the order of their bits."""
    bits = torch.arange(65536, dtype=torch.int32)
    return bits[(bits & 0x7FFF) < FINITE].to(torch.uint16).view(torch.bfloat16).view(-1, 128)


def every_bf16_at_scale_one() -> Tensor:
    """All BF16 values of at most 448 in tiles that also hold 448, so that the scale is 1: each is rounded as it is."""
    values = every_bf16().flatten()
    values = values[values.abs() <= 448]
    values = torch.cat([values, values.new_zeros(-len(values) % 127)]).view(-1, 127)
    return torch.cat([values, values.new_full((len(values), 1), 448.0)], 1)


def every_amax_mantissa() -> Tensor:
    """FP32 rows whose largest value takes every mantissa near those at which the scale changes, over all exponents."""
    mantissas = torch.cat(
        [torch.arange(64), torch.arange(0x600000 - 64, 0x600000 + 64), torch.arange(0x7FFFC0, 0x800000)]
    )
    exponents = torch.arange(90, 254, 9)
    bits = (exponents[:, None] << 23 | mantissas[None]).flatten().to(torch.int32)
    rows_RD = torch.zeros(len(bits), 4)
    rows_RD[:, 1], rows_RD[:, 2] = bits.view(torch.float32), -bits.view(torch.float32) / 3
    return rows_RD


def routed(*, top_k: int, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """rows_RD, row_TK with unused copies, weights_TK."""
    generator = torch.Generator().manual_seed(seed)
    rows_RD = torch.randn(19, hidden, generator=generator).bfloat16()
    row_TK = torch.randint(-1, 19, (11, top_k), generator=generator)
    row_TK[3] = -1
    weights_TK = torch.rand(11, top_k, generator=generator)
    weights_TK[row_TK < 0] = torch.nan  # never looked at
    return rows_RD, row_TK, weights_TK


def bits(x: Tensor) -> Tensor:
    """Bits of a tensor, every NaN the same."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    if x.is_floating_point():
        nan = x.float().isnan()
        return x.view(kind).masked_fill(nan, 0x7F)
    return x


def same(a: rows.QuantisedRows, b: rows.QuantisedRows) -> bool:
    """Whether codes and exponents are the same bits."""
    return torch.equal(bits(a.values_RD), bits(b.values_RD)) and torch.equal(a.exponents_RG, b.exponents_RG)
