"""The three FP8 products of a linear layer in two forms: fast, and exact (the oracle in reference.py).

Fast, power-of-two scales: E4M3 times a power of two is exact in BF16, so the rounded operands go through one BF16
product with FP32 accumulation. It differs from the exact form by the order of the sum and by its result, which a CPU
rounds to BF16. FP32 scales do not fit in BF16: the bare values are multiplied block by block of 128 along K, each
block's sum rounded to BF16, scaled and added in FP32.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from model.fp8 import reference
from model.fp8.formats import TILE_SIZE, Layout, Operand, QuantisedTensor, Tile
from model.fp8.quantise import Quantiser
from model.linear import grouped_product
from model.weight_grad import add_product

Rounded = TypeVar("Rounded")


class Products(Protocol[Rounded]):
    """Rounds operands and multiplies them; groups are those of the operands' rows."""

    def rounded(self, quantiser: Quantiser, x: Tensor, counts: tuple[int, ...]) -> Rounded:
        """x in the quantiser's tiles."""
        ...

    def cached(self, quantiser: Quantiser, x: Tensor, counts: tuple[int, ...]) -> tuple[QuantisedTensor, Rounded]:
        """x to keep and x to multiply, from one pass."""
        ...

    def requantised(self, quantiser: Quantiser, tensor: QuantisedTensor) -> Rounded:
        """What was kept, in the quantiser's tiles."""
        ...

    def fprop(self, x: Rounded, weight: Rounded) -> Tensor:
        """x [rows, in], weight [groups * out, in] -> [rows, out], BF16 or FP32."""
        ...

    def dgrad(self, grad: Rounded, weight: Rounded) -> Tensor:
        """grad [rows, out], weight [groups * out, in] -> [rows, in], BF16 or FP32."""
        ...

    def add_wgrad(self, acc: Tensor, grad: Rounded, x: Rounded) -> None:
        """acc [groups, out, in] in FP32 += grad^T x, group by group.

        Fast, power-of-two scales: grad must be TURNED and x PADDED, which spares the CPU's product a slow transpose.
        """
        ...


class ExactProducts:
    """The oracle: see reference.py. Some ten times slower than the fast form."""

    def rounded(self, quantiser: Quantiser, x: Tensor, counts: tuple[int, ...]) -> QuantisedTensor:
        """See Products."""
        return quantiser.quantise(x, counts)

    def cached(
        self, quantiser: Quantiser, x: Tensor, counts: tuple[int, ...]
    ) -> tuple[QuantisedTensor, QuantisedTensor]:
        """See Products."""
        tensor = quantiser.quantise(x, counts)
        return tensor, tensor

    def requantised(self, quantiser: Quantiser, tensor: QuantisedTensor) -> QuantisedTensor:
        """See Products."""
        return tensor if tensor.tile is quantiser.tile else quantiser.requantise(tensor)

    def fprop(self, x: QuantisedTensor, weight: QuantisedTensor) -> Tensor:
        """See Products."""
        return reference.fprop(x, weight)

    def dgrad(self, grad: QuantisedTensor, weight: QuantisedTensor) -> Tensor:
        """See Products."""
        return reference.dgrad(grad, weight)

    def add_wgrad(self, acc: Tensor, grad: QuantisedTensor, x: QuantisedTensor) -> None:
        """See Products."""
        acc.add_(reference.wgrad(grad, x).view(acc.shape))


class FastProducts:
    """BF16 products of operands that are exact in BF16."""

    def rounded(self, quantiser: Quantiser, x: Tensor, counts: tuple[int, ...]) -> Operand:
        """See Products."""
        return quantiser.operand(x, counts)

    def cached(self, quantiser: Quantiser, x: Tensor, counts: tuple[int, ...]) -> tuple[QuantisedTensor, Operand]:
        """See Products."""
        return quantiser.both(x, counts)

    def requantised(self, quantiser: Quantiser, tensor: QuantisedTensor) -> Operand:
        """See Products."""
        if tensor.tile is quantiser.tile:
            return quantiser.as_operand(tensor)
        return quantiser.requantised_operand(tensor)

    def fprop(self, x: Operand, weight: Operand) -> Tensor:
        """See Products."""
        stack = _stack(weight)
        if x.scales is None:
            counts = x.rows.counts
            return x.values @ stack[0].t() if len(stack) == 1 else grouped_product(x.values, stack.mT, counts)
        return _by_group(x, weight, contract_weight_rows=False)

    def dgrad(self, grad: Operand, weight: Operand) -> Tensor:
        """See Products."""
        stack = _stack(weight)
        if grad.scales is None:
            counts = grad.rows.counts
            return grad.values @ stack[0] if len(stack) == 1 else grouped_product(grad.values, stack, counts)
        return _by_group(grad, weight, contract_weight_rows=True)

    def add_wgrad(self, acc: Tensor, grad: Operand, x: Operand) -> None:
        """See Products."""
        acc_EOI = acc if acc.dim() == 3 else acc.unsqueeze(0)
        if grad.scales is not None and x.scales is not None:
            for group, left, right in zip(acc_EOI, _groups(grad), _groups(x), strict=True):
                group.add_(_scaled_product(_transposed(left), _transposed(right)))
            return
        assert grad.layout is Layout.TURNED and x.layout is Layout.PADDED
        starts = grad.rows.padded_starts
        for group, start, stop in zip(acc_EOI, starts, starts[1:], strict=False):
            if start < stop:
                add_product(group, grad.values[:, start:stop], x.values[start:stop])


def _stack(weight: Operand) -> Tensor:
    return weight.values.view(len(weight.rows.counts), -1, weight.values.shape[1])


@dataclass(frozen=True)
class _Scaled:
    """Bare BF16 values [outer, K] and their FP32 scales [outer, blocks of K]."""

    values: Tensor
    scales: Tensor


def _groups(operand: Operand) -> list[QuantisedTensor]:
    assert operand.scales is not None
    shape = tuple(operand.values.shape)
    return list(QuantisedTensor(operand.values, operand.scales, operand.tile, operand.rows, shape).groups())


def _straight(tensor: QuantisedTensor) -> _Scaled:
    by_block = tensor.tile is Tile.BLOCK
    return _Scaled(tensor.values, tensor.scales[tensor.rows.block_of_row] if by_block else tensor.scales)


def _transposed(tensor: QuantisedTensor) -> _Scaled:
    scales = tensor.scales.t()
    if tensor.tile is Tile.BLOCK:
        scales = scales.repeat_interleave(TILE_SIZE, dim=0)[: tensor.values.shape[1]]
    return _Scaled(tensor.values.t(), scales)


def _scaled_product(left: _Scaled, right: _Scaled) -> Tensor:
    result = torch.zeros(len(left.values), len(right.values), device=left.values.device)
    for block, start in enumerate(range(0, left.values.shape[1], TILE_SIZE)):
        part = slice(start, start + TILE_SIZE)
        partial = (left.values[:, part] @ right.values[:, part].t()).float()
        result.addcmul_(partial.mul_(left.scales[:, block, None]), right.scales[None, :, block])
    return result


def _by_group(rows: Operand, weight: Operand, *, contract_weight_rows: bool) -> Tensor:
    orient = _transposed if contract_weight_rows else _straight
    pairs = zip(_groups(rows), _groups(weight), strict=True)
    return torch.cat([_scaled_product(_straight(part), orient(matrix)) for part, matrix in pairs])
