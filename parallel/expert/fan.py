"""Copies of items and their sums: how tokens fan out to nodes, to ranks and to experts, and how results fan in."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.expert.transfer import Parcel

SCRATCH_ELEMENTS, LEAST_COLUMNS = 1 << 19, 64  # 2 MiB in FP32; of a block of columns


@dataclass(frozen=True)
class Fan:
    """num_items items, of which copy c is made from item source_C[c]; `sum` is the transpose of copying.

    is_identity: copy c is of item c, as where a hop has one rank and every token takes it.
    """

    source_C: Tensor
    num_items: int
    is_identity: bool = False

    @staticmethod
    def by_column(mask_NM: Tensor, num_copies: int) -> "Fan":
        """A copy of item n for every m that mask_NM marks, by m, then n; num_copies: marks, known to the host."""
        if mask_NM.shape[1] == 1 and num_copies == len(mask_NM):
            return Fan(torch.arange(num_copies, device=mask_NM.device), num_copies, is_identity=True)
        marks = torch.nonzero_static(mask_NM.T, size=num_copies)
        return Fan(marks[:, 1], len(mask_NM))

    def gather(self, parcel: Parcel) -> Parcel:
        """The copies of the items' rows; those very rows where each item has one copy."""
        return parcel if self.is_identity else parcel.gather(self.source_C)

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor]:
        """Copies in the order of their items, and where each item's begin."""
        order_C = self.source_C.argsort(stable=True)
        ones = torch.ones_like(self.source_C)
        sizes_N = ones.new_zeros(self.num_items).scatter_add_(0, self.source_C, ones)
        return order_C, sizes_N.cumsum(0) - sizes_N

    def sum(self, rows_CD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Sum of each item's copies, in their order, accumulated in FP32 (FP64 for FP64) and rounded once: [N, D].

        dtype: of the result; None: as accumulated.
        """
        wide = torch.float64 if rows_CD.dtype == torch.float64 else torch.float32
        dtype = dtype or wide
        if self.is_identity:
            return rows_CD.to(dtype)
        if not len(rows_CD) or not self.num_items:
            return rows_CD.new_zeros(self.num_items, rows_CD.shape[1], dtype=dtype)
        order_C, offsets_N = self._bags
        width = max(LEAST_COLUMNS, SCRATCH_ELEMENTS // len(rows_CD))
        if rows_CD.is_cuda or width >= rows_CD.shape[1] or rows_CD.dtype == dtype == wide:
            return F.embedding_bag(order_C, rows_CD.to(wide), offsets_N, mode="sum").to(dtype)
        # Some columns at a time, so that what is widened is still in the cache when it is added up.
        total = rows_CD.new_empty(self.num_items, rows_CD.shape[1], dtype=dtype)
        for part, out in zip(rows_CD.split(width, 1), total.split(width, 1), strict=True):
            out.copy_(F.embedding_bag(order_C, part.to(wide).contiguous(), offsets_N, mode="sum"))
        return total
