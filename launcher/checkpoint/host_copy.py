"""The copy that a save writes from while training goes on: memory made once, filled beside the next step.

A step changes the state only in its update, so the copy is taken while that step's forward and backward run, and the
step waits for it (`wait`) just before the update: not at all where the copy is done by then. Everything else lies
outside of the step: memory is allocated and every page of it touched when a run starts (with the first touch a copy of
128 MiB took 62 ms of CPU instead of 23), page-locked where the state is on a GPU, whose copies go through a stream of
their own; whole flat tensors are copied, not the thousands of pieces that a shard names; what writes the copy runs at
low priority, so that it takes no core from a step. The copy itself goes as fast as memory does: 20 ms of CPU for
128 MiB with torch's copy, memcpy and numpy alike, and no less with huge pages.
"""

import contextlib
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

NICENESS = 10  # of a background thread, of 19: about a tenth of a core that somebody else wants too


class HostCopy:
    """Host memory of the same sizes as some flat tensors, which must keep their shapes and dtypes."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).zero_() for tensor in like
        ]
        self._device = next((tensor.device for tensor in like if tensor.is_cuda), None)
        self._stream = torch.cuda.Stream(self._device) if self._device is not None else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, sources: Sequence[Tensor]) -> None:
        """Start to copy the sources as they are now (on a GPU: as what is queued leaves them).

        They must stay as they are until `wait` returns. RuntimeError where a shape or dtype is another than at first.
        """
        for copy, source in zip(self.tensors, sources, strict=True):
            if copy.shape != source.shape or copy.dtype != source.dtype:
                raise RuntimeError(
                    f"the state is not what memory was made for: {source.dtype} {list(source.shape)} instead of "
                    f"{copy.dtype} {list(copy.shape)}"
                )
        self._error = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._thread = threading.Thread(target=self._copy, args=(list(sources),), daemon=True, name="checkpoint copy")
        self._thread.start()

    def _copy(self, sources: Sequence[Tensor]) -> None:
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                for copy, source in zip(self.tensors, sources, strict=True):
                    copy.copy_(source, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Return when the sources may change again; does not raise. Several threads may wait."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def taken(self) -> list[Tensor]:
        """The copies, once they are there; raises what went wrong."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self.tensors


def run_behind() -> None:
    """Lower the calling thread's priority for good, where the system counts one for each thread (Linux)."""
    if hasattr(os, "setpriority"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
