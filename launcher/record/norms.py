"""Norms of gradients and parameters by group, from shards: every element of the model counts once over all ranks."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from optim.clip import sum_of_squares
from parallel.zero1 import Zero1

GROUPS = (
    "embedding", "attention", "dense_mlp", "routed_experts", "shared_experts", "router", "norms", "head", "mtp",
)  # fmt: skip


def group_of(name: str) -> str:
    """The group of a parameter by its global name; all of an MTP module is `mtp`, RMSNorms within attention `norms`."""
    if name.startswith("mtp."):
        return "mtp"
    if "norm" in name.rsplit(".", 2)[-2]:
        return "norms"
    for part, group in (
        ("embed_tokens", "embedding"), ("lm_head", "head"), (".self_attn.", "attention"), (".mlp.gate.", "router"),
        (".mlp.experts.", "routed_experts"), (".mlp.shared_experts.", "shared_experts"), (".mlp.", "dense_mlp"),
    ):  # fmt: skip
        if part in name:
            return group
    raise ValueError(f"{name}: a parameter of no known group")


class NormsByGroup:
    """Sums of squares of a rank's shards by group; they ride on the all-reduce of the global gradient norm."""

    def __init__(self, zero1: Zero1, device: torch.device) -> None:
        self._device = device
        self._pieces = [
            (GROUPS.index(group_of(piece.name)), bucket, slice(piece.start, piece.stop))
            for bucket in zero1.buckets for piece in bucket.pieces()
        ]  # fmt: skip

    def summing(self, sum_over_ranks: Callable[[Tensor], object], found: dict[str, dict[str, float]]) -> Callable:
        """For `global_norm`: sums its total and, in the same call, every group; `found` gets `grad` and `weight`."""

        def together(total: Tensor) -> None:
            sums = torch.zeros(1 + 2 * len(GROUPS), dtype=torch.float64, device=self._device)
            sums[0] = total
            num_threads = torch.get_num_threads()
            torch.set_num_threads(1)  # the pieces are short: waking the other threads for each costs more than it saves
            try:
                for group, bucket, part in self._pieces:
                    sums[1 + group] += sum_of_squares(bucket.grad[part])
                    sums[1 + len(GROUPS) + group] += sum_of_squares(bucket.master[part])
            finally:
                torch.set_num_threads(num_threads)
            sum_over_ranks(sums)
            total.copy_(sums[0])
            values = [math.sqrt(value) if value >= 0 else value for value in sums[1:].tolist()]
            for kind, start in (("grad", 0), ("weight", len(GROUPS))):
                named = zip(GROUPS, values[start : start + len(GROUPS)], strict=True)
                # a group that the model has not, such as MTP, has no weight
                found[kind] = {
                    name: value for (name, value), weight in zip(named, values[len(GROUPS) :], strict=True) if weight
                }

        return together
