"""The ranks under test, what they exchange, and what is said when one of them does not answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.preflight.verdict import Nodes
from launcher.runtime import Process
from parallel.expert.roll_call import RollCall

T = TypeVar("T")
REPEATS = 5  # the best of them counts: other work on the machine must not look like a bad link
GRACE_SECONDS = 3.0
MODULUS = 251  # patterns are small whole numbers: exact in every type, and no multiple of a buffer's size


@dataclass(frozen=True)
class Team:
    """All ranks of the run, seen from one. payload_bytes: of a test message; slow_share: of the median that is bad."""

    process: Process
    nodes: Nodes
    payload_bytes: int
    slow_share: float

    @property
    def rank(self) -> int:
        """This process."""
        return self.process.rank

    def everyone(self, mine: T) -> list[T]:
        """What every rank has to say, by rank."""
        said: list[Any] = [None] * self.process.world_size
        dist.all_gather_object(said, mine)
        return said

    def synchronise(self) -> None:
        """Wait for the GPU, so that a clock may be read."""
        if self.process.device.type == "cuda":
            torch.cuda.synchronize(self.process.device)

    def best_seconds(self, work: Callable[[], object]) -> float:
        """The shortest of a few runs, after one that sets up connections."""
        work()
        best = float("inf")
        for _ in range(REPEATS):
            self.synchronise()
            began = time.perf_counter()
            work()
            self.synchronise()
            best = min(best, time.perf_counter() - began)
        return best

    def phase(self, what: str, work: Callable[[], T]) -> T:
        """work(); a collective that fails in it is answered with the ranks that give no sign of life."""
        try:
            return work()
        except RuntimeError as error:
            if getattr(type(error), "user_error", False):
                raise
            assert dist.group.WORLD is not None
            call = RollCall(dist.group.WORLD, grace_seconds=GRACE_SECONDS)
            raise call.failure(f"preflight, {what}", range(self.process.world_size), error) from error


def pattern(source: int, target: int, length: int, device: torch.device) -> Tensor:
    """What `source` sends to `target`: float32 [length] of whole numbers below 251, other for every pair."""
    start = (source * 31 + target * 7) % MODULUS
    return ((torch.arange(length, device=device) + start) % MODULUS).float()
