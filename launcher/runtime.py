"""The process as torch sees it: rank, device, threads and process group, from the environment of the launcher."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.config import TrainConfig


@dataclass(frozen=True)
class Process:
    """This process among the run's; device: where its tensors live; local_size: processes on this machine."""

    rank: int
    world_size: int
    device: torch.device
    local_size: int = 1


def _device(choice: str, local_rank: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
INT_MAX = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step instead of giving it back to the kernel page by page.

    Every step allocates the same tensors; mapping them anew cost some percent of a CPU step. Does nothing under another
    C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, INT_MAX), (M_ARENA_MAX, 1)):
        if not mallopt(option, value):
            raise RuntimeError(f"mallopt({option}, {value}) was refused")


@contextmanager
def process_group(train: TrainConfig) -> Iterator[Process]:
    """Join the run described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or stand alone without them.

    gloo on CPUs, NCCL on GPUs. The group is destroyed on the way out, unless an error passes: other ranks may then
    never answer.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = _device(train.device, local_rank)
    if device.type == "cpu":
        keep_freed_memory()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(train.threads or max(1, cores // local_size))
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=train.timeout_seconds)
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size, timeout=timeout)
    yield Process(rank, world_size, device, local_size)
    dist.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone or silent, and not by a fault of this one."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return any(sign in str(error) for sign in ("Connection closed by peer", "Connection reset", "Timed out waiting"))
