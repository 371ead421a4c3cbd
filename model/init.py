"""Initialisation: every weight normal with `initializer_range` (report section 4.2: 0.006), norms one, biases zero.

Each tensor, and each expert of a stack, draws from a generator seeded by (seed, name, expert), so that the initial
model is the same however it is split over ranks.
"""

import hashlib

import torch
from torch import Tensor, nn

from model.experts import Experts
from model.norm import RMSNorm


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise(model: nn.Module, *, std: float, seed: int) -> None:
    """Fill all parameters of a stage, whose names must be the global ones."""
    modules = dict(model.named_modules())
    for name, weight in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        holder = modules.get(name.rpartition(".")[0].rpartition(".")[0])
        if isinstance(owner, RMSNorm):
            weight.fill_(1.0)
        elif isinstance(holder, Experts):
            for expert, part in zip(holder.expert_ids, weight, strict=True):
                _fill(part, std, _generator(seed, f"{name}:{expert}"))
        else:
            _fill(weight, std, _generator(seed, name))


def _fill(weight: Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
