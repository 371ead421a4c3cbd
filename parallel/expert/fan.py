"""Copies of items and their sums: how tokens fan out to nodes, to ranks and to experts, and how results fan in."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Fan:
    """num_items items, of which copy c is made from item source_C[c]; `sum` is the transpose of copying."""

    source_C: Tensor
    num_items: int

    @staticmethod
    def by_column(mask_NM: Tensor, num_copies: int) -> "Fan":
        """A copy of item n for every m that mask_NM marks, by m, then n; num_copies: marks, known to the host."""
        marks = torch.nonzero_static(mask_NM.T, size=num_copies)
        return Fan(marks[:, 1], len(mask_NM))

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor]:
        """Copies in the order of their items, and where each item's begin."""
        order_C = self.source_C.argsort(stable=True)
        ones = torch.ones_like(self.source_C)
        sizes_N = ones.new_zeros(self.num_items).scatter_add_(0, self.source_C, ones)
        return order_C, sizes_N.cumsum(0) - sizes_N

    def sum(self, rows_CD: Tensor) -> Tensor:
        """Sum of each item's copies, in their order, accumulated and returned in FP32 (FP64 for FP64): [N, D]."""
        wide = rows_CD if rows_CD.dtype == torch.float64 else rows_CD.float()
        if not len(wide) or not self.num_items:
            return wide.new_zeros(self.num_items, rows_CD.shape[1])
        order_C, offsets_N = self._bags
        return F.embedding_bag(order_C, wide, offsets_N, mode="sum")
