"""Samples of what FP8 does to a run's tensors, every fp8.watch_every steps, from all ranks to all ranks."""

import torch.distributed as dist

from launcher.build import Run
from model.fp8.apply import watches
from model.fp8.watch import TensorStats, worst


def is_due(run: Run) -> bool:
    """Whether the coming step is one of those that are sampled; the same on all ranks."""
    every = run.config.fp8.watch_every if run.config.train.precision == "fp8" else 0
    return every > 0 and (run.progress.step + 1) % every == 0


def begin(run: Run) -> None:
    """Before a step: let every FP8 layer here record its tensors once, if a sample is due."""
    if is_due(run):
        for watch in watches(run.model.stages.values()):
            watch.arm()


def end(run: Run) -> list[TensorStats] | None:
    """After the backward, before the step counts: the worst of all ranks for every tensor; None if none was due."""
    if not is_due(run):
        return None
    own = [watch.take() for watch in watches(run.model.stages.values())]
    own.append(run.zero1.weight_stats())  # the masters are still those that the step's weights were rounded from
    everyone: list[list[list[TensorStats]] | None] = [None] * dist.get_world_size(run.groups.world)
    dist.all_gather_object(everyone, own, group=run.groups.world)
    return worst(sample for samples in everyone if samples for sample in samples)


def first_non_finite(run: Run) -> str | None:
    """The first tensor that was not finite when an FP8 layer here read it."""
    return next((w.first_non_finite for w in watches(run.model.stages.values()) if w.first_non_finite), None)
