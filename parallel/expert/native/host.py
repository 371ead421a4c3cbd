"""The `native_host` back end: the kernels on CPU tensors, for processes or threads of one machine.

A warp is a thread, NVLink is shared memory, and InfiniBand a thread that carries out puts late and, with a seed, out of
order where a real network may.
"""

import ctypes
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert.native.dispatcher import Geometry, KernelDispatcher, NativeConfig, agree, checked_shape
from parallel.expert.native.library import Machine, Options, bind_host
from parallel.expert.native.window import Window

T = TypeVar("T")
CHANNELS = 2


@dataclass(frozen=True)
class Underway(Generic[T]):
    """See `model.dispatch.Pending`."""

    future: "Future[T]"

    def wait(self) -> T:
        """See `Pending`. Raises NativeError."""
        return self.future.result()

    def done(self) -> bool:
        """See `Pending`."""
        return self.future.done()


class NativeHostDispatcher(KernelDispatcher):
    """See `KernelDispatcher`. Every transfer runs in a background thread, in the order of the calls."""

    name, device_type = "native_host", "cpu"

    def __init__(
        self, window: Window, *, geometry: Geometry, config: NativeConfig, rank: int, names: list[int] | None = None
    ) -> None:
        """Rank `rank` of those that share a window; see also `over_group` and `in_process`."""
        super().__init__(geometry=geometry, config=config, rank=rank, names=names)
        shape, library = checked_shape(geometry, config, channels=CHANNELS), bind_host()
        options = Options(int(config.timeout_seconds * 1e9), config.seed, config.dead_after, 0)
        self.machine = Machine(library, library.ep_open(shape, rank, window.address, options), shape)
        self._worker = ThreadPoolExecutor(1, f"native-{rank}")
        self._finalizer = weakref.finalize(self, _close, self._worker, self.machine, window)

    @staticmethod
    def over_group(
        group: dist.ProcessGroup, *, num_nodes: int, num_experts: int, hidden_size: int, top_k: int,
        config: NativeConfig,
    ) -> "NativeHostDispatcher":  # fmt: skip
        """For a process of a gloo group whose ranks are all on this machine; collective.

        Raises NativeError if ranks differ in an argument, or cannot share memory.
        """
        geometry = Geometry(dist.get_world_size(group), num_nodes, num_experts, hidden_size, top_k)
        shape = checked_shape(geometry, config, channels=CHANNELS)
        size = bind_host().ep_window_bytes(shape)
        names = agree(group, geometry, config)
        window = Window.over_group(group, size * geometry.num_ranks)
        rank = dist.get_rank(group)
        return NativeHostDispatcher(window, geometry=geometry, config=config, rank=rank, names=names)

    @staticmethod
    def in_process(geometry: Geometry, config: NativeConfig) -> list["NativeHostDispatcher"]:
        """All ranks in this process, to be used from a thread each."""
        size = bind_host().ep_window_bytes(checked_shape(geometry, config, channels=CHANNELS))
        window = Window.in_process(size * geometry.num_ranks)
        return [
            NativeHostDispatcher(window, geometry=geometry, config=config, rank=rank)
            for rank in range(geometry.num_ranks)
        ]

    def close(self) -> None:
        """Ends the background work; otherwise when the object goes."""
        self._finalizer()

    def _start(self, work: Callable[[], T], *inputs: Tensor | None) -> Underway[T]:
        def quietly() -> T:
            with torch.no_grad():
                return work()

        return Underway(self._worker.submit(quietly))


def _close(worker: ThreadPoolExecutor, machine: Machine, window: Window) -> None:
    del window  # mapped until here
    worker.shutdown()
    machine.library.ep_close(ctypes.c_void_p(machine.handle))
