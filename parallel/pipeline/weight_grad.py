"""Weight gradients put off: the pipeline's implementation of the model's sink.

Whatever layer hands in its gradient as a closure is served alike: plain and grouped linears, embedding and head. A
module that keeps its own put-off gradient (Transformer Engine's `backward_dw`) hands in that method as the closure.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.weight_grad import AddGrad, accumulate

Contributions = list[tuple[Tensor, AddGrad]]


class DeferredSink:
    """Runs contributions at once, except inside `collecting`, where they go to a list for `run`.

    A contribution that waits keeps its inputs alive: that is the memory price of a split backward.
    """

    def __init__(self) -> None:
        self._open: Contributions | None = None

    def put(self, weight: Tensor, add: AddGrad) -> None:
        """See `WeightGradSink`."""
        if not weight.requires_grad:
            return
        if self._open is None:
            accumulate(weight, add)
        else:
            self._open.append((weight, add))

    @contextmanager
    def collecting(self, into: Contributions) -> Iterator[None]:
        """Append what is put here to `into`, in the order of the backward."""
        assert self._open is None, "one backward at a time"
        self._open = into
        try:
            yield
        finally:
            self._open = None

    @staticmethod
    @torch.no_grad()
    def run(contributions: Contributions) -> None:
        """Run them in their order and free each one's inputs as soon as it is done."""
        contributions.reverse()
        while contributions:
            weight, add = contributions.pop()
            accumulate(weight, add)
