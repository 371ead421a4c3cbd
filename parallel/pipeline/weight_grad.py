"""Weight gradients put off to a later W action: the pipeline's implementation of the model's sink."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.weight_grad import AddGrad, main_grad

Key = tuple[int, int]  # stage, micro-batch


class DeferredSink:
    """Runs contributions at once, except inside `deferring`, where it queues them until `flush`.

    A queued contribution keeps its inputs alive: that is the memory price of a split backward.
    """

    def __init__(self) -> None:
        self._queues: dict[Key, list[tuple[Tensor, AddGrad]]] = {}
        self._open: list[tuple[Tensor, AddGrad]] | None = None

    def put(self, weight: Tensor, add: AddGrad) -> None:
        """See `WeightGradSink`."""
        if not weight.requires_grad:
            return
        if self._open is None:
            add(main_grad(weight))
        else:
            self._open.append((weight, add))

    @contextmanager
    def deferring(self, stage: int, microbatch: int) -> Iterator[None]:
        """Queue what is put here under (stage, microbatch)."""
        assert self._open is None, "one action at a time"
        self._open = self._queues.setdefault((stage, microbatch), [])
        try:
            yield
        finally:
            self._open = None

    @torch.no_grad()
    def flush(self, stage: int, microbatch: int) -> None:
        """The W action: run what was queued, in its order, and free it."""
        for weight, add in self._queues.pop((stage, microbatch)):
            add(main_grad(weight))

    @property
    def num_waiting(self) -> int:
        """Input gradients whose weight gradients have not run."""
        return len(self._queues)
