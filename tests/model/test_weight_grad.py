"""The accumulators of weight gradients: adding, and writing over what was forgotten."""

import pytest
import torch
from torch import nn

from model.linear import GroupedProductGrad, add_grouped_product
from model.weight_grad import ImmediateSink, ProductGrad, accumulate, add_product, forget, main_grad, settle

GARBAGE = float("nan")  # what was forgotten must not be read


def weight(*shape: int) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(shape))
    main_grad(made).fill_(GARBAGE)
    forget(made)
    return made


def operands(dtype: torch.dtype, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(rows, width, generator=generator).to(dtype) for width in (4, 5))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_written_first_and_then_added(dtype: torch.dtype) -> None:
    left, right = operands(dtype)
    ours, plain = weight(4, 5), torch.zeros(4, 5)
    for _ in range(2):
        accumulate(ours, ProductGrad(left.t(), right))
        add_product(plain, left.t(), right)
        assert torch.equal(main_grad(ours), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(4, 0, 5), (0, 0, 9), (9, 0, 0), (0, 0, 0)])
def test_experts_without_rows_are_zero_after_writing(dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    grad, x = operands(dtype, sum(counts))
    ours, plain = weight(3, 4, 5), torch.zeros(3, 4, 5)
    for _ in range(2):
        accumulate(ours, GroupedProductGrad(grad, x, counts))
        add_grouped_product(plain, grad, x, counts)
        assert torch.equal(main_grad(ours), plain)


def test_any_other_contribution_is_added_to_zeros() -> None:
    ours = weight(3)
    ImmediateSink().put(ours, lambda acc: acc.add_(2.0))
    ImmediateSink().put(ours, lambda acc: acc.add_(1.0))
    assert main_grad(ours).tolist() == [3.0] * 3


def test_settling_zeroes_what_nothing_came_for_and_leaves_the_rest() -> None:
    untouched, given = weight(3), weight(3)
    accumulate(given, lambda acc: acc.add_(1.0))
    for one in (untouched, given):
        settle(one)
        settle(one)
    assert main_grad(untouched).tolist() == [0.0] * 3 and main_grad(given).tolist() == [1.0] * 3
