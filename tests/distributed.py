"""Run a function on N gloo processes, one thread each, and get every rank's result."""

import multiprocessing as mp
import os
import pickle
import queue
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_SECONDS = 240


def _child(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], out: Any
) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        out.put((rank, pickle.dumps(function(*args)), None))  # bytes: a queue would share tensors by descriptor
    except BaseException:
        out.put((rank, None, traceback.format_exc()))


def run_distributed(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) in each of world_size fresh processes; results by rank. Any failure fails with its traceback.

    Function, arguments and results are pickled (they are the test's own), so function is a module-level one.
    """
    from launcher.local import free_port

    context = mp.get_context("spawn")
    out = context.Queue()
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    saved = {key: os.environ.get(key) for key in environment}
    os.environ |= environment
    port = free_port()
    processes = [
        context.Process(target=_child, args=(rank, world_size, port, function, args, out), daemon=True)
        for rank in range(world_size)
    ]
    results: dict[int, Any] = {}
    try:
        for process in processes:
            process.start()
        while len(results) < world_size:
            rank, result, error = out.get(timeout=TIMEOUT_SECONDS)
            if error:
                raise AssertionError(f"rank {rank}:\n{error}")
            results[rank] = pickle.loads(result)
    except queue.Empty:
        missing = sorted(set(range(world_size)) - set(results))
        raise AssertionError(f"ranks {missing} gave no result in {TIMEOUT_SECONDS} s") from None
    finally:
        for process in processes:
            process.kill() if len(results) < world_size else process.join(20)
        for key, value in saved.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
    return [results[rank] for rank in range(world_size)]
