"""One comparison of a predicted with a measured step."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Row:
    """One comparison, in seconds. bar: largest relative error that holds. spread: (longest - shortest) / median.

    core_seconds: processor seconds of all ranks in the pipeline, measured and predicted, which tell the cost of the
    pieces from how they fall together, and which other programs do not disturb. None where the ranks sleep. parts: what
    the prediction is the sum of, in seconds, where there are several. phases_factor: processor seconds of the phases
    among all ranks over those of the same phases timed apart. calibrates: the row that later ones take it from, which
    is no prediction then.
    """

    check: str
    measured: float
    predicted: float
    bar: float
    spread: float
    core_seconds: tuple[float, float] | None = None
    parts: Mapping[str, float] | None = None
    phases_factor: float | None = None
    calibrates: bool = False

    @property
    def relative_error(self) -> float:
        """Signed, of what was measured."""
        return self.predicted / self.measured - 1

    @property
    def holds(self) -> bool:
        """Whether the error is within the bar."""
        return abs(self.relative_error) <= self.bar

    def with_phases_times(self, factor: float) -> "Row":
        """The prediction with its phases so many times as long."""
        parts = {**(self.parts or {}), "phases": factor * (self.parts or {})["phases"]}
        return replace(self, predicted=sum(parts.values()), parts=parts)

    def tree(self) -> dict[str, object]:
        """As JSON has it."""
        return {**asdict(self), "relative_error": self.relative_error, "holds": self.holds}

    @classmethod
    def of_tree(cls, tree: Mapping[str, object]) -> "Row":
        """What `tree` gave."""
        return cls(**{field.name: tree[field.name] for field in fields(cls)})  # type: ignore[arg-type]


def compared(check: str, seconds: Sequence[float], predicted: float, bar: float) -> Row:
    """Of several measured steps, in seconds."""
    median = statistics.median(seconds)
    return Row(check, median, predicted, bar, (max(seconds) - min(seconds)) / median)


def over_ranks(value: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> float:
    """The number reduced over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return tensor.item()
