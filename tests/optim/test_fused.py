"""The fused kernel against torch.optim, bit for bit, and against the plain twin by a bound."""

from dataclasses import replace

import pytest
import torch

from optim.adamw import AdamW
from optim.config import OptimConfig
from optim.fused import ADAMW, STRETCH, FusedAdamW

CONFIG = OptimConfig(moments="fp32", weight_decay=0.1)


def masters_and_grads(sizes: tuple[int, ...], seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw) for size in sizes], [torch.empty(size) for size in sizes]


def fill(grads: list[torch.Tensor], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for grad in grads:
        grad.copy_(torch.randn(grad.shape, generator=draw) * 10.0 ** (step % 5 - 3))


def test_equal_to_torchs_fused_adamw_bit_for_bit() -> None:
    sizes = (STRETCH + 77, 33)
    ours, grads = masters_and_grads(sizes)
    theirs = [torch.nn.Parameter(master.clone()) for master in ours]
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    optimizer = FusedAdamW(ours, grads, [True, False], CONFIG)
    for step in range(6):
        fill(grads, step)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        reference.step()
        optimizer.step(lr=1e-3)
    for shard, parameter in zip(optimizer.shards, theirs, strict=True):
        assert torch.equal(shard.master, parameter)
        assert torch.equal(shard.exp_avg, reference.state[parameter]["exp_avg"])
        assert torch.equal(shard.exp_avg_sq, reference.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize(("moments", "bound"), [("fp32", 2e-6), ("bf16", 2e-2)])
def test_within_the_bound_of_the_plain_twin(moments: str, bound: float) -> None:
    """bound: on the difference of the masters over what 20 steps have changed in them."""
    config, runs = replace(CONFIG, moments=moments), []
    for kind in ADAMW.values():
        masters, grads = masters_and_grads((5000, 100))
        before = [master.clone() for master in masters]
        optimizer = kind(masters, grads, [True, False], config)
        for step in range(20):
            fill(grads, step)
            optimizer.step(lr=1e-3, grad_scale=0.5)
        runs.append([master - old for master, old in zip(masters, before, strict=True)])
    for plain, fused in zip(*runs, strict=True):
        assert float((plain - fused).norm() / plain.norm()) < bound
        assert not torch.equal(plain, torch.zeros_like(plain))


def test_the_clip_scales_the_gradient() -> None:
    changed = []
    for scale, factor in ((0.25, 1.0), (1.0, 0.25)):
        masters, grads = masters_and_grads((100,))
        fill(grads, 3)
        grads[0].mul_(factor)
        optimizer = FusedAdamW(masters, grads, [True], CONFIG)
        optimizer.step(lr=1e-3, grad_scale=scale)
        changed.append(masters[0])
    assert torch.equal(*changed)


def test_names() -> None:
    assert {"plain": AdamW, "torch_fused": FusedAdamW} == ADAMW
