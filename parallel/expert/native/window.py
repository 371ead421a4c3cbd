"""Memory that the ranks of one machine share: their windows, one after the other. It has no name, so nothing is left
behind however the processes end.
"""

import ctypes
import mmap
import os

import torch.distributed as dist

from parallel.expert.native.failure import NativeError


class Window:
    """A mapping of shared memory, zero at first."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    @staticmethod
    def in_process(size_bytes: int) -> "Window":
        """For ranks that are threads of one process."""
        return Window(mmap.mmap(-1, size_bytes))

    @staticmethod
    def over_group(group: dist.ProcessGroup, size_bytes: int) -> "Window":
        """For ranks that are processes of one machine; collective. Raises NativeError on all if one cannot map it."""
        rank, first = dist.get_rank(group), dist.get_global_rank(group, 0)
        descriptor, place, problem = -1, [(0, 0, "")], ""
        if rank == 0:
            descriptor = os.memfd_create("expertpipe", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size_bytes)
            place = [(os.getpid(), descriptor, os.uname().nodename)]
        dist.broadcast_object_list(place, first, group=group)
        pid, number, host = place[0]
        memory = None
        try:
            if host != os.uname().nodename:
                raise OSError(f"it runs on {os.uname().nodename}, rank {first} on {host}")
            own = descriptor if rank == 0 else os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
            memory = mmap.mmap(own, size_bytes)
            if rank != 0:
                os.close(own)
        except OSError as error:
            problem = f"rank {dist.get_rank()} cannot map the {size_bytes} bytes that native_host shares: {error}"
        problems: list[str] = [""] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)  # also the barrier before first use
        if rank == 0:
            os.close(descriptor)
        for text in problems:
            if text:
                raise NativeError(text)
        assert memory is not None
        return Window(memory)
