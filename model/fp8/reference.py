"""The oracle: what the FP8 products of a linear layer must give, to the last bit of FP32.

    Fprop  y = x w^T    x 1x128 (or 128x128), w 128x128, contracted over in features
    Dgrad  dx = dy w    dy 1x128, w 128x128, contracted over out features
    Wgrad  dw = dy^T x  dy 128x1, x 128x1, contracted over the tokens of a group

Over every block of 128 of the contracted dimension the products of E4M3 values are summed exactly and rounded to FP32
once (a float64 sum is exact: 128 products are multiples of 2^-18 below 2^25); then (sum * left scale) * right scale is
added to the result in FP32, blocks in order, as the released fp8_gemm does (a test runs its source, its `dot` taken as
exact). A GPU's sum inside a block differs by what its tensor core drops, which `hopper_accumulate` models apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model.fp8.formats import TILE_SIZE, QuantisedTensor, Tile

# Report 3.5.2: of 32 aligned products the tensor core keeps the highest 14 bits of each, and cuts off the others.
KEPT_BITS = 14
INSTRUCTION_LENGTH = 32


@dataclass(frozen=True)
class Factor:
    """One operand as a product reads it: values float64 [outer, K], scales FP32 [outer, blocks of 128 of K]."""

    values: Tensor
    scales: Tensor

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last (exclusive) index of every block of K."""
        length = self.values.shape[1]
        return list(pairwise([*range(0, length, TILE_SIZE), length])) if length else []


Product = Callable[[Factor, Factor], Tensor]  # left right^T in FP32, scales applied


def along_columns(tensor: QuantisedTensor) -> Factor:
    """A matrix contracted over its columns: tiles 1x128 or 128x128. One group."""
    if tensor.tile is Tile.COLUMN:
        raise ValueError("a tensor in 128x1 tiles cannot be contracted over its columns: quantise it 1x128 or 128x128")
    scales = tensor.wide_scales
    if tensor.tile is Tile.BLOCK:
        scales = scales[tensor.rows.block_of_row]
    return Factor(tensor.values.double(), scales)


def along_rows(tensor: QuantisedTensor) -> Factor:
    """A matrix contracted over its rows: tiles 128x1 or 128x128. One group."""
    if tensor.tile is Tile.ROW:
        raise ValueError("a tensor in 1x128 tiles cannot be contracted over its rows: quantise it 128x1 or 128x128")
    scales = tensor.wide_scales.t()
    if tensor.tile is Tile.BLOCK:
        scales = scales.repeat_interleave(TILE_SIZE, dim=0)[: tensor.values.shape[1]]
    return Factor(tensor.values.double().t(), scales)


def exact_product(left: Factor, right: Factor) -> Tensor:
    """left right^T in FP32 [left outer, right outer], promoted every 128 along K."""
    _check_lengths(left, right)
    result = torch.zeros(len(left.values), len(right.values), device=left.values.device)
    for block, (start, stop) in enumerate(left.bounds):
        partial = (left.values[:, start:stop] @ right.values[:, start:stop].t()).float()
        result += (partial * left.scales[:, block, None]) * right.scales[None, :, block]
    return result


def fprop(x: QuantisedTensor, weight: QuantisedTensor, product: Product = exact_product) -> Tensor:
    """y [rows, out] in FP32: rows of group g of x [rows, in] times group g of weight [groups * out, in]."""
    pairs = zip(x.groups(), weight.groups(), strict=True)
    return torch.cat([product(along_columns(rows), along_columns(matrix)) for rows, matrix in pairs])


def dgrad(grad: QuantisedTensor, weight: QuantisedTensor, product: Product = exact_product) -> Tensor:
    """dx [rows, in] in FP32: rows of group g of grad [rows, out] times group g of weight [groups * out, in]."""
    pairs = zip(grad.groups(), weight.groups(), strict=True)
    return torch.cat([product(along_columns(rows), along_rows(matrix)) for rows, matrix in pairs])


def wgrad(grad: QuantisedTensor, x: QuantisedTensor, product: Product = exact_product) -> Tensor:
    """dw [groups, out, in] in FP32, zero for a group without rows: grad [rows, out], x [rows, in]."""
    pairs = zip(grad.groups(), x.groups(), strict=True)
    return torch.stack([product(along_rows(left), along_rows(right)) for left, right in pairs])


def hopper_product(left: Factor, right: Factor) -> Tensor:
    """As `exact_product`, with the tensor core's sum inside a block of 128: `hopper_accumulate`, promoted."""
    _check_lengths(left, right)
    result = torch.zeros(len(left.values), len(right.values), device=left.values.device)
    for block, (start, stop) in enumerate(left.bounds):
        sides = (Factor(side.values[:, start:stop], side.scales) for side in (left, right))
        partial = hopper_accumulate(*sides, promote_every=None)
        result += (partial * left.scales[:, block, None]) * right.scales[None, :, block]
    return result


def unpromoted_product(left: Factor, right: Factor) -> Tensor:
    """As `hopper_product` without promotion: one accumulator for all of K, which operands enter with their scales.

    Scales of blocks could not be applied otherwise; with one scale for a whole tensor it makes no difference.
    """
    wide = (
        Factor(side.values * side.scales.double().repeat_interleave(TILE_SIZE, dim=1)[:, : side.values.shape[1]],
               side.scales)
        for side in (left, right)
    )  # fmt: skip
    return hopper_accumulate(*wide, promote_every=None)


def hopper_accumulate(
    left: Factor,
    right: Factor,
    *,
    promote_every: int | None = TILE_SIZE,
    kept_bits: int = KEPT_BITS,
    chunk: int = 1 << 18,
) -> Tensor:
    """left right^T of the bare values (scales left out), summed as Hopper's tensor core is described to sum FP8.

    Instructions take 32 products each. These and the sum so far are aligned to the largest of them, cut after
    `kept_bits` bits towards zero, and added. Every `promote_every` products the sum is added to a true FP32 accumulator
    and starts from zero; None: never. A model drawn from the report's words (3.5.2), not a simulation of the chip.

    Returns FP32 [left outer, right outer]. chunk: products held at a time.
    """
    _check_lengths(left, right)
    if promote_every is not None and promote_every % INSTRUCTION_LENGTH:
        raise ValueError(f"promote_every={promote_every} is not a multiple of {INSTRUCTION_LENGTH}")
    num_outer, num_inner = len(left.values), len(right.values)
    step = max(1, chunk // max(1, num_inner * INSTRUCTION_LENGTH))
    parts = []
    for top in range(0, num_outer, step):
        rows = left.values[top : top + step]
        total = torch.zeros(len(rows), num_inner, device=rows.device)
        running = torch.zeros(len(rows), num_inner, dtype=torch.float64, device=rows.device)
        for start in range(0, rows.shape[1], INSTRUCTION_LENGTH):
            if promote_every is not None and start and start % promote_every == 0:
                total += running.float()
                running.zero_()
            stop = start + INSTRUCTION_LENGTH
            products = rows[:, None, start:stop] * right.values[None, :, start:stop]
            running = _aligned_sum(torch.cat([products, running.unsqueeze(-1)], dim=-1), kept_bits)
        parts.append(total + running.float())
    return torch.cat(parts) if parts else left.values.new_zeros(0, num_inner, dtype=torch.float32)


def _aligned_sum(terms: Tensor, kept_bits: int) -> Tensor:
    """Sum over the last dimension with every term cut to the `kept_bits` bits below the largest one's leading bit."""
    exponent = torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent
    step = torch.exp2((exponent - kept_bits).double())
    return ((terms / step).trunc() * step).sum(-1)


def _check_lengths(left: Factor, right: Factor) -> None:
    if left.values.shape[1] != right.values.shape[1]:
        lengths = f"{left.values.shape[1]} and {right.values.shape[1]}"
        raise ValueError(f"the contracted dimensions differ: {lengths}")
