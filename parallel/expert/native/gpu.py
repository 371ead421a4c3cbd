"""The `native` back end: the kernels on GPUs, over NVLink and InfiniBand through NCCL's device API.

Compiled for sm_90a and never run: no GPU was there. The kernels' source is the one that `native_host` runs.
"""

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert.native.dispatcher import Geometry, KernelDispatcher, NativeConfig, agree, checked_shape
from parallel.expert.native.failure import NativeError
from parallel.expert.native.gpu_build import gpu_library
from parallel.expert.native.library import Machine, Options, Shape, bind

T = TypeVar("T")
UNIQUE_ID_BYTES = 128
CHANNELS_PER_SM = 4


@dataclass(frozen=True)
class OnStream(Generic[T]):
    """See `model.dispatch.Pending`: work on a stream of its own, over at `event`."""

    value: T
    event: torch.Event
    outputs: tuple[Tensor | None, ...]

    def wait(self) -> T:
        """See `Pending`: the current stream waits, not the host."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.event)
        for output in self.outputs:
            if output is not None:
                output.record_stream(stream)
        return self.value

    def done(self) -> bool:
        """See `Pending`."""
        return self.event.query()


class GpuLibrary:
    """The compiled kernels and the NCCL that they are to use. Raises NativeError if that NCCL is missing or too old."""

    def __init__(self, path: Path, nccl: str) -> None:
        self.functions, self.nccl = bind(path), nccl.encode()
        self.functions.ep_problem.restype = ctypes.c_char_p
        self.functions.ep_open_gpu.restype = ctypes.c_void_p
        self.functions.ep_set_stream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def unique_id(self) -> bytes:
        """What the ranks of a new NCCL communicator share; made on one of them."""
        out = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
        if self.functions.ep_unique_id(self.nccl, out):
            raise NativeError(f"dispatcher native: {self.problem()}")
        return out.raw

    def open(self, shape: Shape, rank: int, unique_id: bytes, options: Options) -> int:
        """This rank's machine; collective."""
        pointers = (ctypes.byref(shape), rank, ctypes.c_char_p(unique_id), ctypes.byref(options))
        handle = self.functions.ep_open_gpu(self.nccl, *pointers)
        if not handle:
            raise NativeError(f"dispatcher native: rank {rank}: {self.problem()}")
        return handle

    def problem(self) -> str:
        """Why the last call failed."""
        return self.functions.ep_problem().decode()


def find_nccl() -> str:
    """Path of the NCCL library that is installed as a wheel, else the system's."""
    spec = find_spec("nvidia.nccl") if find_spec("nvidia") else None
    for place in (spec.submodule_search_locations or []) if spec else []:
        library = Path(place) / "lib" / "libnccl.so.2"
        if library.exists():
            return str(library)
    return "libnccl.so.2"


def _check_sms(num_sms: int, on_gpu: int) -> None:
    """Some SMs must be left to everything else, or a kernel that a transfer waits for would wait for it."""
    if not 1 <= num_sms < on_gpu:
        raise NativeError(f"dispatcher native: num_sms={num_sms}: from 1 to {on_gpu - 1}, this GPU has {on_gpu}")


class NativeGpuDispatcher(KernelDispatcher):
    """See `KernelDispatcher`. Transfers run on a stream of their own and on num_sms SMs, which must be free.

    A kernel that fails ends by itself on every rank; the next dispatch raises why.
    """

    name, device_type = "native", "cuda"

    def __init__(
        self, group: dist.ProcessGroup, *, num_nodes: int, num_experts: int, hidden_size: int, top_k: int,
        config: NativeConfig, num_sms: int = 20, nccl: str | None = None,
    ) -> None:  # fmt: skip
        """Collective; nodes are groups of neighbouring ranks with NVLink among them. nccl: path of libnccl.so.2."""
        if not torch.cuda.is_available():
            raise NativeError("dispatcher native needs CUDA GPUs; native_host runs the same kernels on a CPU")
        _check_sms(num_sms, torch.cuda.get_device_properties("cuda").multi_processor_count)
        geometry = Geometry(dist.get_world_size(group), num_nodes, num_experts, hidden_size, top_k)
        shape, rank = checked_shape(geometry, config, channels=CHANNELS_PER_SM * num_sms), dist.get_rank(group)
        library = GpuLibrary(gpu_library(), nccl or find_nccl())  # before any rank waits for another
        super().__init__(geometry=geometry, config=config, rank=rank, names=agree(group, geometry, config))
        shared: list[Any] = [library.unique_id() if rank == 0 else None]
        dist.broadcast_object_list(shared, dist.get_global_rank(group, 0), group=group)
        options = Options(int(config.timeout_seconds * 1e9), 0, 0, num_sms)
        self._library, self._stream = library, torch.cuda.Stream()
        self.machine = Machine(library.functions, library.open(shape, rank, shared[0], options), shape)
        library.functions.ep_set_stream(self.machine.handle, self._stream.cuda_stream)
        dist.barrier(group)  # no kernel waits for a rank that is still compiling
        self._finalizer = weakref.finalize(self, library.functions.ep_close, self.machine.handle)

    def _start(self, work: Callable[[], T], *inputs: Tensor | None) -> OnStream[T]:
        self._stream.wait_event(torch.cuda.current_stream().record_event())
        for tensor in inputs:
            if tensor is not None:
                tensor.record_stream(self._stream)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            value = work()
        outputs = tuple(field for field in vars(value).values() if isinstance(field, Tensor))
        return OnStream(value, self._stream.record_event(), outputs)

    def _done(self, status: int) -> None:
        if status:
            raise NativeError(f"dispatcher native: rank {self._names[self.rank]}: {self._library.problem()}")

    def _verify(self) -> None:
        if self.machine.failure().code:
            super()._done(1)
