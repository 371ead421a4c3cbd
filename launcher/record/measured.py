"""What the ranks of a run really did and when: JSON lines, one for each piece of work, and the plan they suggest.

A line is `{"rank": 0, "step": 3, "action": "0F4", "start_us": 12.5, "end_us": 80.1}`: rank on the pipeline axis, step
of the training run, microseconds on one clock. `action` is an action or a pair as in `parallel.pipeline.csv_format`,
or several that ran as one, joined by `+`.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parallel.pipeline.actions import Action, Pair, Schedule, Step, parts
from parallel.pipeline.csv_format import parse_step
from parallel.pipeline.simulate import Timed

FILES = "actions*.jsonl"  # in the folder of a run


class MeasuredError(ValueError):
    """A file of measurements that cannot be used; the message names file and line."""

    user_error = True


@dataclass(frozen=True)
class MeasuredWork:
    """Steps that ran as one piece of work on a rank, in microseconds."""

    rank: int
    step: int
    steps: tuple[Step, ...]
    start_us: float
    end_us: float


def line(*, rank: int, step: int, actions: Sequence[Action], start_us: float, end_us: float) -> str:
    """One piece of work as a line without its end; a forward and a backward are written as a pair."""
    kinds = [action.kind for action in actions]
    if len(kinds) == 2 and kinds.count("F") == 1 and kinds[kinds.index("F") - 1] in "BI":
        first, second = sorted(actions, key=lambda action: action.kind != "F")
        text = str(Pair(first, second))
    else:
        text = "+".join(map(str, actions))
    return json.dumps({"rank": rank, "step": step, "action": text, "start_us": start_us, "end_us": end_us})


def read(path: Path) -> list[MeasuredWork]:
    """All work in a file, or in the files `actions*.jsonl` of a run's folder. MeasuredError for what is not work."""
    files = sorted(path.glob(FILES)) if path.is_dir() else [path]
    if not files:
        raise MeasuredError(f"{path}: no file {FILES} in it")
    found = []
    for file in files:
        for number, text in enumerate(file.read_text().splitlines(), start=1):
            if text.strip():
                found.append(_parse(text, f"{file} line {number}"))
    if not found:
        raise MeasuredError(f"{path}: nothing was measured")
    return found


def _parse(text: str, where: str) -> MeasuredWork:
    try:
        row = json.loads(text)
        steps = tuple(parse_step(part) for part in row["action"].split("+"))
        start, end = float(row["start_us"]), float(row["end_us"])
        rank, step = int(row["rank"]), int(row["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise MeasuredError(f"{where}: {reason}: a line has rank, step, action, start_us and end_us") from error
    known = tuple(step for step in steps if step is not None)
    if len(known) < len(steps):
        raise MeasuredError(f"{where}: action {row['action']!r} is not an action such as 0F4 or (0F4;7B1)OVERLAP_F_B")
    if rank < 0 or not start <= end:
        raise MeasuredError(
            f"{where}: rank {rank}, start_us {start:g}, end_us {end:g}: needs 0 <= rank and start <= end"
        )
    return MeasuredWork(rank, step, known, start, end)


def of_step(work: Iterable[MeasuredWork], schedule: Schedule, *, step: int | None = None) -> list[list[Timed]]:
    """Every rank's steps of one training step in milliseconds from its first start; None: the last that is whole.

    Work of several steps is divided evenly. MeasuredError if no step has every action of the schedule.
    """
    wanted = {a for steps in schedule.ranks for item in steps for a in parts(item)}
    by_step: dict[int, list[MeasuredWork]] = {}
    for piece in work:
        by_step.setdefault(piece.step, []).append(piece)
    candidates = sorted(by_step, reverse=True) if step is None else [step]
    for number in candidates:
        pieces = by_step.get(number, [])
        if {a for piece in pieces for item in piece.steps for a in parts(item)} == wanted:
            return _rows(pieces, schedule.num_ranks)
    which = f"step {step} has" if step is not None else "no step has"
    raise MeasuredError(
        f"{which} exactly the actions of {schedule.name} on {schedule.num_ranks} ranks with "
        f"{schedule.num_microbatches} micro-batches: is this the schedule that ran?"
    )


def _rows(pieces: list[MeasuredWork], num_ranks: int) -> list[list[Timed]]:
    origin = min(piece.start_us for piece in pieces)
    rows: list[list[Timed]] = [[] for _ in range(num_ranks)]
    most = max(piece.rank for piece in pieces)
    if most >= num_ranks:
        raise MeasuredError(f"rank {most} was measured, the schedule has {num_ranks} ranks")
    for piece in sorted(pieces, key=lambda piece: piece.start_us):
        share = (piece.end_us - piece.start_us) / len(piece.steps)
        for i, item in enumerate(piece.steps):
            start = (piece.start_us - origin + i * share) / 1000
            rows[piece.rank].append(Timed(item, start, start + share / 1000))
    return rows


Key = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs of steps as they were measured: the median of each kind of step on each stage, in the unit of `of_rows`."""

    medians: Mapping[Key, float]
    message: float = field(default=0.0)

    @classmethod
    def of_rows(cls, rows: Iterable[Iterable[Timed]]) -> "MeasuredCosts":
        """From the steps of all ranks."""
        seen: dict[Key, list[float]] = {}
        for timed in (timed for row in rows for timed in row):
            seen.setdefault(_key(timed.step), []).append(timed.end - timed.start)
        return cls({key: statistics.median(times) for key, times in seen.items()})

    def of_step(self, step: Step) -> float:
        """The median; of what was never measured, the sum of its parts."""
        key = _key(step)
        if key in self.medians:
            return self.medians[key]
        if isinstance(step, Pair):
            return self.of_step(step.forward) + self.of_step(step.backward)
        stage = step.stage
        if step.kind == "B":
            return self.of_step(Action("I", stage, 0)) + self.of_step(Action("W", stage, 0))
        raise MeasuredError(f"{step.kind} of stage {stage} was never measured alone")


def _key(step: Step) -> Key:
    return tuple((action.kind, action.stage) for action in parts(step))
