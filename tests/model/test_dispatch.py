"""Dispatch and combine in one process: transposes of each other, equal to a plain loop over tokens, nothing dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.dispatch import LocalDispatcher, Permutation, combine_rows, dispatch_tokens, gather_rows, sum_rows

CASES = {"some": (9, 3, 6), "one_token": (1, 2, 4), "no_token": (0, 2, 4), "top_1": (7, 1, 3), "all_experts": (5, 4, 4)}


def choice(tokens: int, top_k: int, experts: int, *, seed: int = 0) -> Tensor:
    """Distinct experts for every token, [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(4, 9), st.integers(0, 99))
def test_rows_are_sorted_by_expert_and_stable(tokens: int, top_k: int, experts: int, seed: int) -> None:
    ids_TK = choice(tokens, top_k, experts, seed=seed)
    order = Permutation.by_expert(ids_TK, experts)
    copies = [(expert, t * top_k + k) for t, row in enumerate(ids_TK.tolist()) for k, expert in enumerate(row)]
    assert order.order_R.tolist() == [copy for _, copy in sorted(copies)]
    assert order.order_R[order.inverse_TK.flatten()].tolist() == list(range(tokens * top_k))


def with_unused(ids_TK: Tensor) -> Tensor:
    """Every third copy unused, and one token without any."""
    ids_TK = ids_TK.clone()
    ids_TK.view(-1)[::3] = -1
    ids_TK[-1:] = -1
    return ids_TK


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gather_and_sum_are_transposes(case: str, dtype: torch.dtype, unused: bool) -> None:
    """<gather(x), y> = <x, sum(y)>."""
    ids_TK = choice(*CASES[case])
    order = Permutation.by_expert(with_unused(ids_TK) if unused else ids_TK, CASES[case][2])
    x, y = torch.randn(len(ids_TK), 5, dtype=dtype), torch.randn(sum(order.counts), 5, dtype=dtype)
    left, right = (gather_rows(x, order) * y).sum(), (x * sum_rows(y, order)).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_an_id_beyond_the_experts_is_named() -> None:
    with pytest.raises(ValueError, match="expert id 7 is out of range: there are 6 experts"):
        Permutation.by_expert(torch.tensor([[0, 7]]), 6)


def test_a_cached_handle_repeats_the_routing() -> None:
    ids_TK, dispatcher = with_unused(choice(9, 3, 6)), LocalDispatcher(6)
    first = dispatcher.dispatch(torch.randn(9, 4), ids_TK, torch.rand(9, 3)).wait()
    x_TD = torch.randn(9, 4)
    again = dispatcher.dispatch(x_TD, handle=first.handle).wait()
    assert torch.equal(again.rows_RD, dispatcher.dispatch(x_TD, ids_TK, torch.rand(9, 3)).wait().rows_RD)
    assert torch.equal(again.weights_R, first.weights_R) and again.counts == first.counts


@pytest.mark.parametrize("case", CASES)
def test_local_dispatch_equals_a_loop_over_tokens(case: str) -> None:
    """Each token's output is the sum over its experts, with expert e multiplying by (e + 1) and the weight."""
    tokens, top_k, experts = CASES[case]
    ids_TK = choice(tokens, top_k, experts)
    weights_TK = torch.rand(tokens, top_k, requires_grad=True)
    x_TD = torch.randn(tokens, 5, requires_grad=True)
    dispatcher = LocalDispatcher(experts)
    sent = dispatch_tokens(dispatcher, x_TD, ids_TK, weights_TK)
    assert sent.rows_RD.shape[0] == sent.weights_R.shape[0] == sum(sent.counts) == tokens * top_k
    assert sent.counts == tuple(ids_TK.flatten().tolist().count(e) for e in range(experts))
    expert_R = torch.arange(experts).repeat_interleave(torch.tensor(sent.counts))
    rows = torch.tanh(sent.rows_RD * (expert_R[:, None] + 1)) * sent.weights_R[:, None]
    out = combine_rows(dispatcher, rows, sent.handle)

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
    sent = LocalDispatcher(4).dispatch(torch.randn(50, 3), ids_TK, torch.ones(50, 1)).wait()
    assert sent.counts == (0, 0, 50, 0)


def test_rows_of_bf16_sum_to_bf16() -> None:
    """Sums of 8 rows, rounded once: within 2^-8 of the sum in FP64."""
    ids_TK = choice(30, 8, 16)
    order = Permutation.by_expert(ids_TK, 16)
    rows = torch.rand(240, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = sum_rows(rows, order)
    exact = rows.double()[order.inverse_TK].sum(1)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= exact * 2**-8).all()
