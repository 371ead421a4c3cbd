"""The bias goes down where more than the mean arrived, up where less, and stays where it is exactly the mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.router_bias import load_violation, update_bias


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=16))
def test_each_bias_moves_by_the_speed_against_its_load(counts: list[int]) -> None:
    bias = torch.arange(len(counts), dtype=torch.float32)
    before = bias.clone()
    update_bias(bias, torch.tensor(counts), 0.125)
    for expert, count in enumerate(counts):
        excess = count * len(counts) - sum(counts)  # exact, where a mean would round
        move = -0.125 if excess > 0 else 0.125 if excess < 0 else 0.0
        assert bias[expert] == before[expert] + move


def test_large_counts_are_compared_exactly() -> None:
    """One token more than the mean among 2^40: FP32 could not tell."""
    bias = torch.zeros(3)
    update_bias(bias, torch.tensor([2**40, 2**40 + 1, 2**40 - 1]), 1e-3)
    assert torch.equal(bias, torch.tensor([0.0, -1e-3, 1e-3]))


def test_a_speed_of_zero_freezes_the_bias() -> None:
    bias = torch.tensor([0.1, -0.2])
    update_bias(bias, torch.tensor([0, 9]), 0.0)
    assert torch.equal(bias, torch.tensor([0.1, -0.2]))


@pytest.mark.parametrize(("counts", "value"), [([4, 4, 4], 1.0), ([12, 0, 0], 3.0), ([6, 3, 3], 1.5), ([0, 0], 1.0)])
def test_load_violation_is_the_largest_over_the_mean(counts: list[int], value: float) -> None:
    assert load_violation(torch.tensor(counts)) == value
