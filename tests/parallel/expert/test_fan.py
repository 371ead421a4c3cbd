"""Copies and their sums against plain loops: every type, whole and by columns, and where nothing fans out."""

import pytest
import torch
from torch import Tensor

from parallel.expert import fan
from parallel.expert.fan import Fan
from parallel.expert.transfer import Parcel

MASK = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)


def by_hand(source: Tensor, rows: Tensor, num_items: int, wide: torch.dtype) -> Tensor:
    total = torch.zeros(num_items, rows.shape[1], dtype=wide)
    for item, row in zip(source.tolist(), rows.to(wide), strict=True):
        total[item] += row
    return total


def test_copies_are_by_column_then_item() -> None:
    made = Fan.by_column(MASK, 6)
    assert made.source_C.tolist() == [0, 2, 2, 3, 0, 2] and not made.is_identity
    rows, extra = torch.arange(8.0).view(4, 2), torch.arange(4, dtype=torch.uint8)[:, None]
    copies = made.gather(Parcel(rows, extra))
    assert copies.extra_NB is not None
    assert torch.equal(copies.rows_ND, rows[made.source_C]) and copies.extra_NB.flatten().tolist() == [0, 2, 2, 3, 0, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_columns", [False, True])
def test_sums_are_in_order_and_rounded_once(
    dtype: torch.dtype, out: torch.dtype | None, by_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_columns:
        monkeypatch.setattr(fan, "SCRATCH_ELEMENTS", 1)
    source = torch.randint(0, 30, (200,))
    rows = (torch.randn(200, 150) * torch.exp2(torch.randint(-6, 6, (200, 1)))).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = by_hand(source, rows, 31, wide).to(out or wide)  # the last item has no copies
    got = Fan(source, 31).sum(rows, out)
    assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_one_column_that_all_take_is_no_copy() -> None:
    rows = Parcel(torch.randn(4, 3))
    whole = Fan.by_column(torch.ones(4, 1, dtype=torch.bool), 4)
    assert whole.is_identity and whole.gather(rows) is rows and torch.equal(whole.sum(rows.rows_ND), rows.rows_ND)
    assert whole.sum(rows.rows_ND, torch.bfloat16).dtype == torch.bfloat16
    assert not Fan.by_column(MASK[:, :1], 2).is_identity  # tokens without an expert take no hop
    assert Fan.by_column(MASK[:, :1], 2).sum(torch.ones(2, 1)).flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("num_items", [0, 5])
def test_nothing_sums_to_zero(num_items: int) -> None:
    total = Fan(torch.empty(0, dtype=torch.int64), num_items).sum(torch.empty(0, 7).bfloat16(), torch.bfloat16)
    assert total.shape == (num_items, 7) and total.dtype == torch.bfloat16 and not total.any()
