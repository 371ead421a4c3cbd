"""Dispatch and combine in one process: transposes of each other, equal to a plain loop over tokens, nothing dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.dispatch import LocalDispatcher, Permutation, permute, unpermute

CASES = {"some": (9, 3, 6), "one_token": (1, 2, 4), "no_token": (0, 2, 4), "top_1": (7, 1, 3), "all_experts": (5, 4, 4)}


def choice(tokens: int, top_k: int, experts: int, *, seed: int = 0) -> Tensor:
    """Distinct experts for every token, [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(4, 9), st.integers(0, 99))
def test_rows_are_sorted_by_expert_and_stable(tokens: int, top_k: int, experts: int, seed: int) -> None:
    ids_TK = choice(tokens, top_k, experts, seed=seed)
    order = Permutation.by_expert(ids_TK)
    copies = [(expert, t * top_k + k) for t, row in enumerate(ids_TK.tolist()) for k, expert in enumerate(row)]
    assert order.order_R.tolist() == [copy for _, copy in sorted(copies)]
    assert order.order_R[order.inverse_TK.flatten()].tolist() == list(range(tokens * top_k))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permute_and_unpermute_are_transposes(case: str, dtype: torch.dtype) -> None:
    """<permute(x), y> = <x, unpermute(y)>, and each one's gradient is the other."""
    ids_TK = choice(*CASES[case])
    order = Permutation.by_expert(ids_TK)
    x = torch.randn(len(ids_TK), 5, dtype=dtype, requires_grad=True)
    y = torch.randn(ids_TK.numel(), 5, dtype=dtype, requires_grad=True)
    there, back = permute(x, order), unpermute(y, order)
    torch.testing.assert_close((there * y).sum(), (x * back).sum(), rtol=1e-5, atol=1e-5)
    there.backward(y.detach())
    back.backward(x.detach())
    assert torch.equal(torch.as_tensor(x.grad), back.detach())
    assert torch.equal(torch.as_tensor(y.grad), there.detach())


@pytest.mark.parametrize("case", CASES)
def test_local_dispatch_equals_a_loop_over_tokens(case: str) -> None:
    """Each token's output is the sum over its experts, with expert e multiplying by (e + 1) and the weight."""
    tokens, top_k, experts = CASES[case]
    ids_TK = choice(tokens, top_k, experts)
    weights_TK = torch.rand(tokens, top_k, requires_grad=True)
    x_TD = torch.randn(tokens, 5, requires_grad=True)
    dispatcher = LocalDispatcher(experts)
    sent = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    assert sent.rows_RD.shape[0] == sent.weights_R.shape[0] == sum(sent.counts) == tokens * top_k
    assert sent.counts == tuple(ids_TK.flatten().tolist().count(e) for e in range(experts))
    expert_R = torch.arange(experts).repeat_interleave(torch.tensor(sent.counts))
    rows = torch.tanh(sent.rows_RD * (expert_R[:, None] + 1)) * sent.weights_R[:, None]
    out = dispatcher.combine(rows, sent.handle)

    plain_x, plain_w = x_TD.detach().clone().requires_grad_(), weights_TK.detach().clone().requires_grad_()
    expected = [
        sum((torch.tanh(plain_x[t] * (e + 1)) * plain_w[t, k] for k, e in enumerate(row)), torch.zeros(5))
        for t, row in enumerate(ids_TK.tolist())
    ]
    plain = torch.stack(expected) if expected else plain_x * 0
    torch.testing.assert_close(out, plain)
    grad = torch.randn(tokens, 5)
    out.backward(grad)
    plain.backward(grad)
    torch.testing.assert_close(x_TD.grad, plain_x.grad)
    if tokens:
        torch.testing.assert_close(weights_TK.grad, plain_w.grad)


def test_no_token_is_dropped_when_all_go_to_one_expert() -> None:
    ids_TK = torch.full((50, 1), 2)
    sent = LocalDispatcher(4).dispatch(torch.randn(50, 3), ids_TK, torch.ones(50, 1))
    assert sent.counts == (0, 0, 50, 0)


def test_rows_of_bf16_sum_to_bf16() -> None:
    """Sums of 8 rows, rounded once: within 2^-8 of the sum in FP64."""
    ids_TK = choice(30, 8, 16)
    order = Permutation.by_expert(ids_TK)
    rows = torch.rand(240, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = unpermute(rows, order)
    exact = rows.double()[order.inverse_TK].sum(1)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= exact * 2**-8).all()
