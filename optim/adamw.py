"""AdamW (arXiv 1711.05101) on flat shards: FP32 masters and gradients, moments BF16 (report section 3.2.3) or FP32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.config import OptimConfig

# Elements worked on at a time: temporaries in cache, and passes so short that torch keeps them on one thread.
CHUNK = 1 << 15


@dataclass(frozen=True)
class Shard:
    """What one call updates: master and grad FP32, both moments, all flat and of one length."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decay: bool


class AdamW:
    """State and step of AdamW over the shards of one rank.

    masters, grads: FP32, flat, pairwise alike; grads are read at every step. decays: whether weight decay applies.
    steps: updates done so far, for bias correction.
    """

    def __init__(
        self, masters: Sequence[Tensor], grads: Sequence[Tensor], decays: Sequence[bool], config: OptimConfig
    ) -> None:
        self.config, self.steps = config, 0
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.moments]
        self.shards = [
            Shard(master, grad, torch.zeros_like(master, dtype=dtype), torch.zeros_like(master, dtype=dtype), decay)
            for master, grad, decay in zip(masters, grads, decays, strict=True)
        ]
        longest = max((len(master) for master in masters), default=0)
        self._scratch = [torch.empty(min(CHUNK, longest), device=m.device) for m in masters[:1] for _ in range(3)]

    def step(self, *, lr: float, grad_scale: float = 1.0) -> None:
        """One update of every master; gradients are multiplied by grad_scale (the clip) on the way."""
        self.steps += 1
        for shard in self.shards:
            self.update(shard, lr=lr, grad_scale=grad_scale)

    @torch.no_grad()
    def update(self, shard: Shard, *, lr: float, grad_scale: float = 1.0) -> None:
        """One shard's part of the step that `steps` counts, for a ZeRO that calls its optimizer bucket by bucket."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sqrt wakes the others even for a chunk, at ten times the price of the pass
        try:
            for start in range(0, len(shard.master), CHUNK):
                self._update(shard, slice(start, start + CHUNK), lr, grad_scale)
        finally:
            torch.set_num_threads(num_threads)

    def _update(self, shard: Shard, part: slice, lr: float, grad_scale: float) -> None:
        c = self.config
        master, avg, avg_sq = shard.master[part], shard.exp_avg[part], shard.exp_avg_sq[part]
        grad, wide_avg, wide_sq = (buffer[: len(master)] for buffer in self._scratch)
        torch.mul(shard.grad[part], grad_scale, out=grad)
        if avg.dtype == torch.float32:
            wide_avg, wide_sq = avg, avg_sq
        else:  # BF16 moments are widened, updated and rounded back
            wide_avg.copy_(avg)
            wide_sq.copy_(avg_sq)
        wide_avg.lerp_(grad, 1 - c.beta1)
        wide_sq.mul_(c.beta2).addcmul_(grad, grad, value=1 - c.beta2)
        if avg is not wide_avg:
            avg.copy_(wide_avg)
            avg_sq.copy_(wide_sq)
        denominator = torch.sqrt(wide_sq, out=grad).div_((1 - c.beta2**self.steps) ** 0.5).add_(c.eps)
        if shard.decay:
            master.mul_(1 - lr * c.weight_decay)
        master.addcdiv_(wide_avg, denominator, value=-lr / (1 - c.beta1**self.steps))
