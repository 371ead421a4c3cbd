"""AdamW by torch's fused kernel: one pass over all four tensors, on a CPU or a GPU; `adamw.py` is its plain twin.

The kernel reads and writes FP32 moments, as `torch.optim.AdamW(fused=True)` gives them, and equals that bit for bit.
BF16 moments are widened before it and rounded after it, stretch by stretch, so that no FP32 copy of all of them exists.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.adamw import AdamW, Shard
from optim.config import OptimConfig

STRETCH = 1 << 18  # elements widened at a time


class FusedAdamW(AdamW):
    """As `AdamW`, with the arithmetic of torch's kernel, which differs from the plain one by rounding."""

    def __init__(
        self, masters: Sequence[Tensor], grads: Sequence[Tensor], decays: Sequence[bool], config: OptimConfig
    ) -> None:
        super().__init__(masters, grads, decays, config)
        longest = min(STRETCH, max((len(master) for master in masters), default=0))
        self._wide = [torch.empty(longest, device=m.device) for m in masters[:1] for _ in range(3)]

    @torch.no_grad()
    def step(self, *, lr: float, grad_scale: float = 1.0) -> None:
        """One update of every master; gradients are multiplied by grad_scale (the clip) on the way."""
        self.steps += 1
        for shard in self.shards:
            for start in range(0, len(shard.master), STRETCH):
                self._kernel(shard, slice(start, start + STRETCH), lr, grad_scale)

    def _kernel(self, shard: Shard, part: slice, lr: float, grad_scale: float) -> None:
        c = self.config
        master, avg, avg_sq = shard.master[part], shard.exp_avg[part], shard.exp_avg_sq[part]
        grad, wide_avg, wide_sq = (buffer[: len(master)] for buffer in self._wide)
        torch.mul(shard.grad[part], grad_scale, out=grad)
        if avg.dtype == torch.float32:
            wide_avg, wide_sq = avg, avg_sq
        else:
            wide_avg.copy_(avg)
            wide_sq.copy_(avg_sq)
        steps = torch.full((), float(self.steps), device=master.device)
        torch.ops.aten._fused_adamw_(
            [master], [grad], [wide_avg], [wide_sq], [], [steps],
            lr=lr, beta1=c.beta1, beta2=c.beta2, eps=c.eps, weight_decay=c.weight_decay if shard.decay else 0.0,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        if avg is not wide_avg:
            avg.copy_(wide_avg)
            avg_sq.copy_(wide_sq)


ADAMW: dict[str, type[AdamW]] = {"plain": AdamW, "torch_fused": FusedAdamW}
