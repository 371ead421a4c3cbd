"""The router: equations 12 to 20 in plain Python, and what the bias and the groups may and may not do."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.router import Router, attach_loss
from tests.model.reference import TINY

GROUPED = replace(TINY, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3)


def router(config: ModelConfig, *, seed: int = 0, bias: float = 0.3) -> Router:
    made, generator = Router(config), torch.Generator().manual_seed(seed)
    made.proj.weight.data.normal_(0, 0.2, generator=generator)
    made.e_score_correction_bias.normal_(0, bias, generator=generator)
    return made


def tokens(config: ModelConfig, count: int = 40, *, seed: int = 1) -> Tensor:
    return torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def chosen_by_hand(scores: list[float], bias: list[float], config: ModelConfig) -> set[int]:
    """Best groups by the sum of their two best biased scores, then best experts in those."""
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = config.n_routed_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    if config.n_group > 1:
        groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
        groups = groups[: config.topk_group]
    experts = sorted((e for group in groups for e in group), key=lambda e: -biased[e])
    return set(experts[: config.num_experts_per_tok])


@pytest.mark.parametrize("config", [GROUPED, replace(GROUPED, n_group=1, topk_group=1)], ids=["groups", "one_group"])
def test_choice_and_weights_equal_plain_python(config: ModelConfig) -> None:
    gate, x = router(config), tokens(config)
    routing = gate(x)
    logits = x.double() @ gate.proj.weight.double().t()
    for t, logit in enumerate(logits):
        scores = torch.sigmoid(logit).tolist()
        chosen = chosen_by_hand(scores, gate.e_score_correction_bias.tolist(), config)
        assert set(routing.ids_TK[t].tolist()) == chosen
        total = sum(scores[e] for e in chosen)
        for expert, weight in zip(routing.ids_TK[t].tolist(), routing.weights_TK[t].tolist(), strict=True):
            assert weight == pytest.approx(2.5 * scores[expert] / total, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), bias=st.sampled_from([0.0, 0.1, 10.0]), topk_group=st.integers(1, 4))
def test_experts_are_distinct_and_in_few_groups(seed: int, bias: float, topk_group: int) -> None:
    config = replace(GROUPED, topk_group=topk_group)
    routing = router(config, seed=seed, bias=bias)(tokens(config, 8, seed=seed))
    for ids in routing.ids_TK.tolist():
        assert len(set(ids)) == config.num_experts_per_tok
        assert len({expert // 4 for expert in ids}) <= topk_group
    assert torch.allclose(routing.weights_TK.sum(1), torch.tensor(config.routed_scaling_factor))


def test_the_bias_changes_choices_and_never_a_weight() -> None:
    """The weights of a biased choice are those of the plain scores of the same experts."""
    plain, biased = router(GROUPED, bias=0.0), router(GROUPED, bias=0.0)
    biased.e_score_correction_bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    x = tokens(GROUPED)
    before, after = plain(x), biased(x)
    assert (before.ids_TK.sort(1).values != after.ids_TK.sort(1).values).any()
    assert torch.equal(before.scores_TE, after.scores_TE)
    chosen = before.scores_TE.gather(1, after.ids_TK)
    assert torch.equal(after.weights_TK, chosen / (chosen.sum(1, keepdim=True) + 1e-20) * 2.5)
    # A constant bias changes nothing at all.
    plain.e_score_correction_bias.fill_(0.25)
    assert torch.equal(plain(x).weights_TK, before.weights_TK)


def test_negative_biased_scores_do_not_let_masked_groups_in() -> None:
    """Masked groups are -inf, not 0: with every biased score below 0 the choice is unchanged."""
    gate = router(GROUPED)
    before = gate(tokens(GROUPED)).ids_TK
    gate.e_score_correction_bias -= 5
    assert torch.equal(gate(tokens(GROUPED)).ids_TK.sort(1).values, before.sort(1).values)


def test_no_gradient_reaches_the_bias_and_weights_are_differentiable() -> None:
    gate, x = router(GROUPED), tokens(GROUPED).requires_grad_()
    gate(x).weights_TK.square().sum().backward()
    assert x.grad is not None and x.grad.any()
    assert not gate.e_score_correction_bias.requires_grad


def test_weights_are_not_normalised_where_the_config_says_so() -> None:
    config = replace(GROUPED, norm_topk_prob=False)
    routing = router(config)(tokens(config))
    assert torch.equal(routing.weights_TK, routing.scores_TE.gather(1, routing.ids_TK) * 2.5)


def test_counts_add_up_until_reset() -> None:
    gate = router(GROUPED)
    first, second = gate(tokens(GROUPED, seed=1)), gate(tokens(GROUPED, seed=2))
    ids = torch.cat([first.ids_TK, second.ids_TK]).flatten().tolist()
    assert gate.counts_E.tolist() == [ids.count(expert) for expert in range(16)]
    assert gate.counts_E.sum() == 2 * 40 * 3  # no token dropped
    gate.reset()
    assert not gate.counts_E.any() and not gate.balance_loss_sum.any()


def test_scores_of_bf16_tokens_are_fp32() -> None:
    gate, x = router(GROUPED).bfloat16(), tokens(GROUPED).bfloat16()
    logits = x.double() @ gate.proj.weight.double().t()
    scores = gate(x).scores_TE
    assert scores.dtype == torch.float32
    assert (scores.double() - torch.sigmoid(logits)).abs().max() < 1e-6


@pytest.mark.parametrize("sequences", [1, 4])
def test_balance_loss_equals_equations_17_to_20(sequences: int) -> None:
    config = replace(GROUPED, aux_loss_alpha=0.01)
    gate, x = router(config), tokens(config)
    routing = gate(x)
    scores = routing.scores_TE.detach()
    length, num_experts, top_k = 40 // sequences, 16, 3
    total = 0.0
    for b in range(sequences):
        window = range(b * length, (b + 1) * length)
        for i in range(num_experts):
            f_i = num_experts / (top_k * length) * sum(routing.ids_TK[t].tolist().count(i) for t in window)
            shares = [float(scores[t, i] / scores[t].sum()) for t in window]
            total += config.aux_loss_alpha * f_i * sum(shares) / length
    loss = gate.balance_loss(routing, sequences)
    assert float(loss.detach()) == pytest.approx(total / sequences, rel=1e-5)
    assert float(gate.balance_loss_sum) == pytest.approx(total / sequences, rel=1e-5)


def test_perfect_balance_costs_alpha() -> None:
    """Equal scores and equal counts: f_i = 1 and P_i = 1/E, so the loss is alpha."""
    config = replace(GROUPED, n_group=1, topk_group=1, num_experts_per_tok=4, aux_loss_alpha=0.5)
    gate = router(config)
    gate.proj.weight.data.zero_()
    routing = gate(tokens(config, 4))
    balanced = replace(routing, ids_TK=torch.arange(16).view(4, 4))
    assert float(gate.balance_loss(balanced, 1).detach()) == pytest.approx(0.5, rel=1e-6)


def test_an_attached_loss_changes_nothing_and_gets_its_share_as_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    factor = torch.tensor(2.0, requires_grad=True)
    out = attach_loss(x, 5 * factor, 0.25)
    assert torch.equal(out, x)
    out.backward(torch.full((3, 4), 7.0))
    assert x.grad is not None and (x.grad == 7).all()  # nothing of the loss leaks into x
    assert factor.grad == 5 * 0.25
