"""Clipping by the global norm of gradients that lie in shards over many ranks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

STRETCH = 4096  # elements


def global_norm(shards: Iterable[Tensor], sum_over_ranks: Callable[[Tensor], object], device: torch.device) -> float:
    """L2 norm of all gradients: shards that no other rank counts, summed in FP64 by `sum_over_ranks` (in place)."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for shard in shards:
        total += sum_of_squares(shard)
    sum_over_ranks(total)
    return total.sqrt().item()


def sum_of_squares(flat: Tensor) -> Tensor:
    """Of a flat tensor: in FP32 within stretches short enough to be accurate, in FP64 over them, with no FP64 copy."""
    whole = len(flat) // STRETCH * STRETCH
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, STRETCH), dim=1)
    total = norms.double().square().sum() + torch.linalg.vector_norm(flat[whole:]).double().square()
    # Squares beyond 1e38 overflow FP32 although the values are finite: only then is the FP64 copy worth its price.
    return total if torch.isfinite(total) else flat.double().square().sum()


def clip_scale(norm: float, limit: float) -> float:
    """Factor on the gradients so that their norm is at most `limit`; 1 if limit is 0 (no clipping)."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
