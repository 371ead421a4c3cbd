"""Lanes of a slept device whose sends leave by themselves when what they carry has been computed.

As NCCL's do on a stream: the rank issues a send and goes on. Here a thread sleeps until the device would have computed
the tensor and sends it then. Receives are the process group's own: the rank waits for them.
"""

import queue
import threading
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.pipeline.p2p import Lanes
from parallel.pipeline.slept import SleptDevice, sleep_precisely, sleep_until


class _Sending:
    """A send that was issued, as `torch.distributed.Work` as far as the mailbox uses it."""

    def __init__(self, group: dist.ProcessGroup, tensors: list[Tensor], destination: int, due: float) -> None:
        self._group, self._tensors, self._destination, self._due = group, tensors, destination, due
        self._sent = threading.Event()
        self._work: dist.Work | None = None
        self._error: RuntimeError | None = None

    def leave(self) -> None:
        """Send, when it is time."""
        sleep_until(self._due)
        try:
            self._work = self._group.send(self._tensors, self._destination, 0)
        except RuntimeError as error:
            self._error = error
        self._sent.set()

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self._sent.is_set() and (self._work is None or self._work.is_completed())

    def wait(self) -> bool:
        """Until it has left; RuntimeError if it could not."""
        self._sent.wait()
        if self._error is not None:
            raise self._error
        assert self._work is not None
        return self._work.wait()


@dataclass(frozen=True)
class _Lane:
    """One direction: a process group whose sends go through the thread."""

    group: dist.ProcessGroup
    device: SleptDevice
    issued: "queue.SimpleQueue[_Sending]"

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> _Sending:
        """Issue a send of what the device computes last before it."""
        assert tag == 0
        sending = _Sending(self.group, tensors, destination, self.device.free_at)
        self.issued.put(sending)
        return sending

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        """The group's own."""
        return self.group.recv(tensors, source, tag)


class SleptLanes:
    """`parallel.pipeline.p2p.Lanes` around those of a rank, for a device with `sends`."""

    def __init__(self, lanes: Lanes, device: SleptDevice) -> None:
        assert device.sends, "the device would wait before every send"
        issued: queue.SimpleQueue[_Sending] = queue.SimpleQueue()
        self.down: Any = _Lane(lanes.down, device, issued)
        self.up: Any = _Lane(lanes.up, device, issued)
        threading.Thread(target=_courier, args=(issued,), daemon=True, name="slept sends").start()


def _courier(issued: "queue.SimpleQueue[_Sending]") -> None:
    """One thread for both directions: what is issued later is computed later."""
    sleep_precisely()
    while True:
        issued.get().leave()
