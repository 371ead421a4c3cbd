"""Clipping: the norm over shards and ranks is that of the whole, and the factor is torch's."""

import pytest
import torch
from torch import Tensor

from optim.clip import clip_scale, global_norm

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1001, 100_003])
def test_the_norm_of_shards_is_the_norm_of_the_whole(size: int) -> None:
    """Within 2e-7: FP32 inside short stretches, FP64 over them. One FP32 sum of many numbers drifts further."""
    whole = torch.randn(size, generator=torch.Generator().manual_seed(0))
    norm = global_norm(whole.split([500, 1, size - 501]), lambda total: None, CPU)
    assert norm == pytest.approx(whole.double().norm().item(), rel=2e-7)


def test_squares_are_what_is_summed_over_ranks() -> None:
    """Two ranks with norms 3 and 4 have 5 together."""

    def other_rank(total: Tensor) -> None:
        assert total.dtype == torch.float64 and total.item() == 9
        total += 16

    assert global_norm([torch.tensor([3.0, 0.0])], other_rank, CPU) == 5


def test_small_shards_are_not_lost_beside_a_large_one() -> None:
    """Ten thousand squares of 1e-8 beside a 1: in FP32 each would vanish."""
    shards = [torch.ones(1)] + [torch.full((1,), 1e-4)] * 10_000
    assert global_norm(shards, lambda total: None, CPU) == pytest.approx((1 + 1e-4) ** 0.5, rel=1e-9)


def test_a_rank_without_shards_has_norm_zero_and_a_bad_gradient_shows() -> None:
    assert global_norm([], lambda total: None, CPU) == 0
    assert global_norm([torch.tensor([1.0, float("inf")])], lambda total: None, CPU) == float("inf")
    norm = global_norm([torch.tensor([1.0, float("nan")])], lambda total: None, CPU)
    assert norm != norm


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.0, 1.5, 80.0])
@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_the_factor_is_that_of_torch(norm: float, limit: float) -> None:
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.tensor([norm], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([weight], limit)
    assert norm * clip_scale(norm, limit) == pytest.approx(weight.grad.item(), rel=1e-12)
    assert clip_scale(norm, limit) <= 1


def test_a_limit_of_zero_does_not_clip() -> None:
    assert clip_scale(1e9, 0.0) == 1.0


def test_huge_finite_gradients_have_a_finite_norm() -> None:
    """1e30 squared overflows FP32, the norm does not."""
    assert global_norm([torch.full((5000,), 1e30)], lambda total: None, CPU) == pytest.approx(1e30 * 5000**0.5)
