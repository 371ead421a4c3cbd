"""Exponential moving average of the weights in host memory, updated beside the next step (report section 3.2.3).

After a step the FP32 masters are copied to host memory; the average itself is taken by a thread while the next step
runs (torch's operations release the interpreter's lock). Each rank averages its own shards: what a rank holds in host
memory is two FP32 copies of its masters, the average and the buffer of the copy, and no rank holds the whole model.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class EMA:
    """average = decay * average + (1 - decay) * master after every `update`, beginning with the masters as they are.

    masters: flat, FP32, on any device. decay: above 0, below 1. Work that fails is raised by the next call.
    """

    def __init__(self, masters: Sequence[Tensor], *, decay: float) -> None:
        assert 0 < decay < 1, f"decay {decay}"
        self.decay, self._masters = decay, list(masters)
        self._averages = [_host_copy(master) for master in self._masters]
        self._buffers = [_host_copy(master) for master in self._masters]
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Copy the masters and start averaging; waits for the update before if that is still at work.

        The masters may change as soon as this returns, on a GPU as soon as work queued after it runs.
        """
        self.wait()
        for buffer, master in zip(self._buffers, self._masters, strict=True):
            buffer.copy_(master, non_blocking=master.is_cuda)
        copied = None
        if any(master.is_cuda for master in self._masters):
            copied = torch.cuda.Event()
            copied.record()
        self._pending = self._worker.submit(self._average, copied)

    def _average(self, copied: "torch.cuda.Event | None") -> None:
        if copied is not None:
            copied.synchronize()
        with torch.no_grad():
            for average, buffer in zip(self._averages, self._buffers, strict=True):
                average.lerp_(buffer, 1 - self.decay)

    def wait(self) -> None:
        """Return when every update has been averaged."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def averages(self) -> list[Tensor]:
        """The averages as of the last update: FP32 in host memory, one for each master, to read or to fill."""
        self.wait()
        return self._averages

    def restart(self) -> None:
        """Begin again with the masters as they are now."""
        self.wait()
        for average, master in zip(self._averages, self._masters, strict=True):
            average.copy_(master)


def _host_copy(master: Tensor) -> Tensor:
    """In pinned memory where the original is on a GPU, so that copies need not wait."""
    copy = torch.empty(master.shape, dtype=torch.float32, pin_memory=master.is_cuda)
    return copy.copy_(master.detach())
