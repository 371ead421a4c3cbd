"""Rotary position and latent attention equal their formulas in torch complex numbers and plain cat/expand."""

import cmath
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.init import initialise
from model.mla import MultiHeadLatentAttention, _Assemble
from model.rope import inverse_frequencies, rotate, rotations, softmax_scale
from tests.model.reference import TINY, YARN


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pairs_turn_by_position_times_frequency() -> None:
    """Dimensions 2i and 2i+1 of position s turn by s * theta^(-2i/P), in Python's complex numbers."""
    x = randn(1, 5, 2, 8)
    turned = rotate(x, rotations(TINY, 5))
    for s in range(5):
        for i in range(4):
            for h in range(2):
                pair = complex(*x[0, s, h, 2 * i : 2 * i + 2].tolist()) * cmath.exp(1j * s * 10000 ** (-2 * i / 8))
                assert turned[0, s, h, 2 * i].item() == pytest.approx(pair.real, abs=1e-6)
                assert turned[0, s, h, 2 * i + 1].item() == pytest.approx(pair.imag, abs=1e-6)


@pytest.mark.parametrize("config", [TINY, YARN])
def test_products_depend_on_the_distance_only(config: ModelConfig) -> None:
    q, k = randn(8), randn(8, seed=1)
    turns = rotations(config, 200)

    def product(i: int, j: int) -> float:
        turned_q, turned_k = (rotate(x.view(1, 1, 1, 8), turns[at : at + 1]) for x, at in ((q, i), (k, j)))
        return float((turned_q * turned_k).sum())

    for distance in (0, 1, 7, 60):
        values = [product(start + distance, start) for start in (0, 3, 50, 139)]
        assert max(values) - min(values) < 5e-5
    assert abs(product(5, 0) - product(0, 5)) > 1e-3  # and on its sign


def test_the_conjugate_turns_back() -> None:
    x, turns = randn(2, 6, 3, 8), rotations(TINY, 6)
    assert (rotate(rotate(x, turns), turns.conj()) - x).abs().max() < 1e-6


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    """DeepSeek-V3's extension: below 32 turns over 4096 positions it interpolates, below 1 it slows by the factor."""
    scaling = RopeScaling(factor=40.0, original_max_position_embeddings=4096)
    config = replace(TINY, qk_rope_head_dim=64, rope_scaling=scaling)
    plain, slowed = inverse_frequencies(replace(config, rope_scaling=None)), inverse_frequencies(config)
    turns = 4096 * plain / (2 * math.pi)
    ratio = plain / slowed
    assert (ratio[turns > 40] == 1).all()
    assert torch.allclose(ratio[turns < 0.7], torch.tensor(40.0))
    assert (ratio.diff() >= 0).all()


def test_yarn_scales_the_softmax_alone() -> None:
    scaling = RopeScaling(factor=40.0, original_max_position_embeddings=4096)
    config = replace(TINY, rope_scaling=scaling)
    assert softmax_scale(config) == pytest.approx(softmax_scale(TINY) * (0.1 * math.log(40) + 1) ** 2)
    assert torch.allclose(rotations(config, 9).abs(), torch.ones(9, 4))
    assert softmax_scale(TINY) == 24**-0.5


def plain_assemble(q: Tensor, kv: Tensor, k_rope: Tensor, turns: Tensor, nope: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads by cat and expand: q, k [B, H, S, X], v [B, H, S, V]."""

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    heads = q.shape[2]
    q = torch.cat([q[..., :nope], turn(q[..., nope:])], -1)
    k = torch.cat([kv[..., :nope], turn(k_rope.unsqueeze(2)).expand(-1, -1, heads, -1)], -1)
    return q.transpose(1, 2), k.transpose(1, 2), kv[..., nope:].transpose(1, 2)


def test_assembled_heads_and_gradients_equal_cat_and_expand() -> None:
    """Bitwise forward; backward sums the shared key over heads in FP32."""
    nope, value = 4, 3
    leaves = [randn(2, 5, 3, nope + 8), randn(2, 5, 3, nope + value, seed=1), randn(2, 5, 8, seed=2)]
    turns = rotations(TINY, 5)
    ours, plain = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    out = _Assemble.apply(*ours, turns, nope)
    assert isinstance(out, tuple)
    expected = plain_assemble(plain[0], plain[1], plain[2], turns, nope)
    grads = [randn(*tensor.shape, seed=5 + i) for i, tensor in enumerate(expected)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(out, expected, strict=True))
    torch.autograd.backward(expected, grads)
    torch.autograd.backward(out, grads)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("q_lora_rank", [48, None])
def test_attention_equals_its_equations(q_lora_rank: int | None) -> None:
    """Equations 1 to 11 with an explicit mask and softmax, in FP64."""
    config = replace(TINY, q_lora_rank=q_lora_rank)
    attention = MultiHeadLatentAttention(config)
    initialise(attention, std=0.2, seed=0)
    h = randn(2, 9, config.hidden_size)
    weight = {name: value.double() for name, value in attention.named_parameters()}

    def norm(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    u = h.double()
    if q_lora_rank is None:
        query = u @ weight["q_proj.weight"].t()
    else:
        query = norm(u @ weight["q_a_proj.weight"].t()) @ weight["q_b_proj.weight"].t()
    latent, k_rope = (u @ weight["kv_a_proj_with_mqa.weight"].t()).split([32, 8], -1)
    keys_values = norm(latent) @ weight["kv_b_proj.weight"].t()
    turns = rotations(config, 9).to(torch.complex128)
    q, k, v = plain_assemble(query.unflatten(-1, (4, 24)), keys_values.unflatten(-1, (4, 28)), k_rope, turns, 16)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(24)).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ weight["o_proj.weight"].t()
    out = attention(h, rotations(config, 9))
    assert (out.double() - expected).norm() / expected.norm() < 1e-6


def test_no_position_sees_a_later_one() -> None:
    attention = MultiHeadLatentAttention(TINY)
    initialise(attention, std=0.2, seed=0)
    h, turns = randn(1, 9, TINY.hidden_size), rotations(TINY, 9)
    changed = h.clone()
    changed[0, 5] += 1
    before, after = attention(h, turns), attention(changed, turns)
    assert torch.equal(before[0, :5], after[0, :5])
    assert ((before - after)[0, 5:].abs().amax(-1) > 1e-4).all()
