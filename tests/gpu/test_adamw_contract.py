"""Fused AdamW on a GPU against the plain twin, which is bitwise torch's: apex's and Transformer Engine's kernels too.

python -m pytest tests/gpu/test_adamw_contract.py -m gpu
"""

from dataclasses import replace

import pytest
import torch

from optim.adamw import AdamW
from optim.config import OptimConfig
from optim.fused import ADAMW, STRETCH
from optim.missing import MissingKernel
from tests.optim.test_fused import CPU_ADAM_BOUNDS, fill

pytestmark = pytest.mark.gpu

SIZES = (STRETCH + 5000, 100)
CONFIG = OptimConfig(weight_decay=0.1)


def changes(kind: type[AdamW], moments: str, device: str) -> list[torch.Tensor]:
    """What 20 steps change in two masters; gradients are drawn on the CPU."""
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=draw) for size in SIZES]
    masters, grads = [master.to(device) for master in drawn], [torch.empty(size, device=device) for size in SIZES]
    optimizer = kind(masters, grads, [True, False], replace(CONFIG, moments=moments))
    for step in range(20):
        new = [torch.empty(size) for size in SIZES]
        fill(new, step)
        for grad, values in zip(grads, new, strict=True):
            grad.copy_(values)
        optimizer.step(lr=1e-3, grad_scale=0.5)
    return [master.cpu() - before for master, before in zip(masters, drawn, strict=True)]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["plain", "torch_fused", "apex", "transformer_engine"])
def test_within_the_bound_of_the_plain_twin(name: str, moments: str) -> None:
    """bound: on the difference of the masters over what 20 steps have changed in them."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        found = changes(ADAMW[name], moments, "cuda")
    except MissingKernel as missing:
        pytest.skip(str(missing))
    expected = changes(AdamW, moments, "cpu")
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < CPU_ADAM_BOUNDS[moments]
