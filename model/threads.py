"""Coarse work on a CPU's threads: each thread takes whole items and computes them with torch on one thread.

torch splits every operation over its threads, and waking them costs more than a short operation gains; small products
also lose efficiency when they are split. Python threads suit items of at least some hundred microseconds: torch lets
go of the interpreter while it computes.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch


def _on_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first call in a thread settles its number


@functools.cache
def _pool(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, thread_name_prefix="model", initializer=_on_one_thread)


Item = TypeVar("Item")


def spread(work: Callable[[Iterator[Item]], object], items: Iterable[Item]) -> None:
    """Call `work` once on each of torch's threads, at the same time, all drawing from the same items.

    Every item is drawn by exactly one call, in an order that is free: items must not depend on each other. A call sees
    torch with one thread and gradients off; the first error of any call is raised when all have ended.
    """
    todo = list(items)
    num_threads = min(torch.get_num_threads(), len(todo))
    if num_threads <= 1:
        work(iter(todo))
        return
    shared, inference = iter(todo), torch.is_inference_mode_enabled()

    def draw() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(shared)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    futures = [_pool(num_threads - 1).submit(draw) for _ in range(num_threads - 1)]
    try:
        draw()
    finally:
        errors = [future.exception() for future in futures]
        torch.set_num_threads(before)
    for error in errors:
        if error is not None:
            raise error
