"""Clipping by the global norm of gradients that lie in shards over many ranks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def global_norm(shards: Iterable[Tensor], sum_over_ranks: Callable[[Tensor], object], device: torch.device) -> float:
    """L2 norm of all gradients: shards that no other rank counts, summed in FP64 by `sum_over_ranks` (in place)."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for shard in shards:
        total += torch.linalg.vector_norm(shard, dtype=torch.float64).square()
    sum_over_ranks(total)
    return total.sqrt().item()


def clip_scale(norm: float, limit: float) -> float:
    """Factor on the gradients so that their norm is at most `limit`; 1 if limit is 0 (no clipping)."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
