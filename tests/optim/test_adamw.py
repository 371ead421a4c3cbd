"""AdamW equals torch's, bitwise in FP32; BF16 moments stay near."""

import pytest
import torch
from torch import Tensor

from optim.adamw import CHUNK, AdamW
from optim.config import OptimConfig

FP32 = OptimConfig(moments="fp32")
SIZES = (5, 1000, CHUNK + 3)  # the last one takes two chunks


def numbers(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def ours(config: OptimConfig, decays: list[bool]) -> tuple[AdamW, list[Tensor], list[Tensor]]:
    masters, grads = [numbers(size, 0) for size in SIZES], [torch.zeros(size) for size in SIZES]
    return AdamW(masters, grads, decays, config), masters, grads


def torch_adamw(decays: list[bool], config: OptimConfig) -> tuple[torch.optim.AdamW, list[Tensor]]:
    weights = [numbers(size, 0).requires_grad_() for size in SIZES]
    groups = [
        {"params": [weight], "weight_decay": config.weight_decay if decay else 0.0}
        for weight, decay in zip(weights, decays, strict=True)
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, foreach=False), weights


@pytest.mark.parametrize("decays", [[True] * 3, [False] * 3, [True, False, True]])
def test_fp32_steps_equal_torch_bitwise(decays: list[bool]) -> None:
    """Masters and both moments after each of six steps with a learning rate of its own."""
    optimizer, masters, grads = ours(FP32, decays)
    reference, weights = torch_adamw(decays, FP32)
    for step in range(6):
        lr = 1e-3 * (step + 1)
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            grad.copy_(numbers(len(grad), 10 * step + i + 1) * 10.0 ** (step - 3))
            weight.grad = grad.clone()
        for group in reference.param_groups:
            group["lr"] = lr
        optimizer.step(lr=lr)
        reference.step()
        for shard, weight in zip(optimizer.shards, weights, strict=True):
            assert torch.equal(shard.master, weight)
            assert torch.equal(shard.exp_avg, reference.state[weight]["exp_avg"])
            assert torch.equal(shard.exp_avg_sq, reference.state[weight]["exp_avg_sq"])
    assert all(shard.master is master for shard, master in zip(optimizer.shards, masters, strict=True))
    assert optimizer.steps == 6


def test_grad_scale_is_a_factor_on_the_gradient() -> None:
    scaled, masters, grads = ours(FP32, [True] * 3)
    plain, other_masters, other_grads = ours(FP32, [True] * 3)
    for grad, other in zip(grads, other_grads, strict=True):
        grad.copy_(numbers(len(grad), 1))
        other.copy_(grad * 0.25)
    scaled.step(lr=1e-2, grad_scale=0.25)
    plain.step(lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(masters, other_masters, strict=True))
    assert torch.equal(grads[0], numbers(5, 1))  # and the gradient itself is left alone


def test_bf16_moments_stay_near_fp32() -> None:
    """Over 50 steps the way a master went differs by less than 2% in norm; moments are BF16, masters FP32."""
    narrow, masters, grads = ours(OptimConfig(), [True] * 3)
    wide, exact, other_grads = ours(FP32, [True] * 3)
    start = masters[1].clone()
    for step in range(50):
        for grad, other in zip(grads, other_grads, strict=True):
            grad.copy_(numbers(len(grad), step + 1) + 0.3)
            other.copy_(grad)
        narrow.step(lr=1e-3)
        wide.step(lr=1e-3)
    shard = narrow.shards[1]
    assert (shard.exp_avg.dtype, shard.exp_avg_sq.dtype) == (torch.bfloat16, torch.bfloat16)
    assert shard.master.dtype == torch.float32
    moved = (exact[1] - start).norm()
    difference = (masters[1] - exact[1]).norm()
    assert 0 < difference < 0.02 * moved


def test_the_first_step_is_exact_with_bf16_moments() -> None:
    """The update uses the moments before they are rounded."""
    narrow, masters, grads = ours(OptimConfig(), [False] * 3)
    wide, exact, other_grads = ours(FP32, [False] * 3)
    for grad, other in zip(grads, other_grads, strict=True):
        grad.copy_(numbers(len(grad), 1))
        other.copy_(grad)
    narrow.step(lr=1e-3)
    wide.step(lr=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(masters, exact, strict=True))


def test_decay_pulls_to_zero_without_a_gradient() -> None:
    optimizer, masters, _ = ours(FP32, [True, False, True])
    before = [master.clone() for master in masters]
    optimizer.step(lr=0.5)
    assert torch.equal(masters[0], before[0] * (1 - 0.5 * 0.1))
    assert torch.equal(masters[1], before[1])


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError):
        AdamW([torch.zeros(2)], [], [True], FP32)
