"""The update that balances experts without a loss (report section 2.1.2, arXiv 2408.15664)."""

import torch
from torch import Tensor


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, speed: float) -> None:
    """bias -= speed where an expert got more than the mean of the global batch, += where less; in place.

    bias_E FP32; counts_E: tokens each expert received in the step over all ranks (int64).
    """
    # counts * E against the sum: exact in integers, so that all holders decide alike.
    over_E = counts_E * counts_E.numel() - counts_E.sum()
    bias_E.sub_(over_E.sign().to(bias_E.dtype), alpha=speed)


def load_violation(counts_E: Tensor) -> float:
    """Largest load over the mean load: 1 is perfect balance."""
    total = counts_E.sum().item()
    return counts_E.max().item() * counts_E.numel() / total if total else 1.0
