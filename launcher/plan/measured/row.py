"""One comparison of a predicted with a measured step."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Row:
    """One comparison, in seconds. bar: largest relative error that holds. spread: (longest - shortest) / median.

    core_seconds: processor seconds of all ranks in the pipeline, measured and predicted, which tell the cost of the
    pieces from how they fall together, and which other programs do not disturb. None where the ranks sleep. parts: what
    the prediction is the sum of, in seconds, where there are several.
    """

    check: str
    measured: float
    predicted: float
    bar: float
    spread: float
    core_seconds: tuple[float, float] | None = None
    parts: Mapping[str, float] | None = None

    @property
    def relative_error(self) -> float:
        """Signed, of what was measured."""
        return self.predicted / self.measured - 1

    @property
    def holds(self) -> bool:
        """Whether the error is within the bar."""
        return abs(self.relative_error) <= self.bar

    def tree(self) -> dict[str, object]:
        """As JSON has it."""
        return {**asdict(self), "relative_error": self.relative_error, "holds": self.holds}


def compared(check: str, seconds: Sequence[float], predicted: float, bar: float) -> Row:
    """Of several measured steps, in seconds."""
    median = statistics.median(seconds)
    return Row(check, median, predicted, bar, (max(seconds) - min(seconds)) / median)


def over_ranks(value: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> float:
    """The number reduced over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return tensor.item()
