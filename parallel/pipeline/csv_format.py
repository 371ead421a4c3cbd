"""Schedules as text, in the compute-only CSV notation of torch.distributed.pipelining. No torch.

A row a rank, a cell an action (`0F4`, `1I3`, `1W3`, `2B0`) or a pair (`(0F4;7B1)OVERLAP_F_B`); an empty cell is idle
time and means nothing. Stages and micro-batches count as in `Schedule`. torch reads what is written here as long as a
stage is on one rank; a schedule with two directions is written in the same way and can be read here only, for torch has
no placement for it.
"""

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass

from parallel.pipeline.actions import Action, Pair, Schedule, Step, parts
from parallel.pipeline.check import InvalidSchedule, check
from parallel.pipeline.order import walk
from parallel.pipeline.placement import Placement

_ACTION = re.compile(r"(\d+)([FIBW])(\d+)")
_COMMUNICATION = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|(SEND|RECV)_[FB]\d+)")
_PAIR = re.compile(r"\((\d+)F(\d+);(\d+)([BI])(\d+)\)OVERLAP_F_B")
MOST_FAULTS = 8


class ScheduleFileError(ValueError):
    """A file that holds no sound schedule; the message names row and column, both counted from 1."""

    user_error = True


@dataclass(frozen=True)
class _Cell:
    """Where an action stands."""

    rank: int
    column: int

    def __str__(self) -> str:
        return f"row {self.rank + 1} column {self.column + 1}"


def write(schedule: Schedule) -> str:
    """The schedule as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([str(step) for step in steps] for steps in schedule.ranks)
    return out.getvalue()


def read(text: str, *, name: str) -> Schedule:
    """The sound schedule in a CSV text; `name` is what it will be called, for example the file.

    The placement is found in the text. ScheduleFileError for cells that are no actions, and for actions that are
    missing, doubled, on another rank than the others of their stage, or wait for each other.
    """
    rows = list(csv.reader(io.StringIO(text)))
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    ranks, cells = _parse(rows, name)
    S, M = (1 + max(key) for key in zip(*((a.stage, a.microbatch) for a in cells), strict=True))
    missing = sorted(set(range(S)) - {action.stage for action in cells})
    if missing:
        raise ScheduleFileError(f"{name}: no row has an action of stage {missing[0]}, though there is a stage {S - 1}")
    placement = _placement(cells, S, M)
    _complain(name, [*_misplaced(cells, placement, M), *_incomplete(cells, placement, S, M)])
    schedule = Schedule(name, len(rows), S, M, placement, ranks)
    _complain(name, _deadlock(schedule, cells))
    try:
        check(schedule)
    except InvalidSchedule as error:  # nothing known gets here
        raise ScheduleFileError(str(error)) from error
    return schedule


def _complain(name: str, faults: list[str]) -> None:
    if faults:
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise ScheduleFileError(f"{name}: " + "; ".join([*faults[:MOST_FAULTS], *more]))


def _parse(rows: list[list[str]], name: str) -> tuple[tuple[tuple[Step, ...], ...], dict[Action, _Cell]]:
    """Every rank's steps, and where each action stands."""
    faults: list[str] = []
    cells: dict[Action, _Cell] = {}
    ranks: list[tuple[Step, ...]] = []
    for rank, row in enumerate(rows):
        steps: list[Step] = []
        for column, raw in enumerate(row):
            text, cell = raw.strip(), _Cell(rank, column)
            if not text:
                continue
            step = parse_step(text)
            if step is None and _COMMUNICATION.fullmatch(text):
                _complain(name, [f'{cell}: {text!r} is communication: let torch write it with format="compute_only"'])
            if step is None:
                faults.append(f"{cell}: {text!r} is not an action such as 0F4, 1I3, 1W3, 2B0 or (0F4;7B1)OVERLAP_F_B")
                continue
            for action in parts(step):
                if action in cells:
                    faults.append(f"{cell}: {action} again, it is already in {cells[action]}")
                cells.setdefault(action, cell)
            steps.append(step)
        if not steps and not faults:
            faults.append(f"row {rank + 1} has no action: a rank needs a stage")
        ranks.append(tuple(steps))
    _complain(name, faults if rows else ["the file is empty: a row for each rank is needed"])
    return tuple(ranks), cells


def parse_step(text: str) -> Step | None:
    """The action or pair that a cell holds; None if it holds neither."""
    found = _ACTION.fullmatch(text)
    if found:
        return Action(found[2], int(found[1]), int(found[3]))
    found = _PAIR.fullmatch(text)
    if found:
        return Pair(Action("F", int(found[1]), int(found[2])), Action(found[4], int(found[3]), int(found[5])))
    return None


def _placement(cells: dict[Action, _Cell], num_stages: int, num_microbatches: int) -> Placement:
    """Each stage's rank for the first and for the second half of the micro-batches: where most of its actions are."""
    rows = []
    for half in (0, 1):
        found = [Counter[int]() for _ in range(num_stages)]
        for action, cell in cells.items():
            if (2 * action.microbatch >= num_microbatches) == bool(half):
                found[action.stage][cell.rank] += 1
        if all(found):
            rows.append(tuple(min(ranks, key=lambda rank: (-ranks[rank], rank)) for ranks in found))
    if rows:
        return tuple(dict.fromkeys(rows))
    # Too few actions to tell halves apart: every stage where any of its actions is
    return (tuple(next(cell.rank for a, cell in cells.items() if a.stage == s) for s in range(num_stages)),)


def _rank(placement: Placement, stage: int, microbatch: int, num_microbatches: int) -> int:
    return placement[len(placement) > 1 and 2 * microbatch >= num_microbatches][stage]


def _misplaced(cells: dict[Action, _Cell], placement: Placement, num_microbatches: int) -> list[str]:
    faults = []
    for action, cell in cells.items():
        home = _rank(placement, action.stage, action.microbatch, num_microbatches)
        if cell.rank != home:
            faults.append(f"{cell}: {action} belongs in row {home + 1}, where the others of stage {action.stage} are")
    return faults


def _incomplete(cells: dict[Action, _Cell], placement: Placement, num_stages: int, num_microbatches: int) -> list[str]:
    """Every stage does F and B, or F, I and W, of every micro-batch."""
    faults = []
    for stage in range(num_stages):
        for m in range(num_microbatches):
            here = {kind: cells[a] for kind in "FBIW" if (a := Action(kind, stage, m)) in cells}
            kinds = "".join(here)
            if kinds in ("FB", "FIW"):
                continue
            row = _rank(placement, stage, m, num_microbatches) + 1
            beside = ", ".join(f"{stage}{kind}{m} is in {cell}" for kind, cell in here.items())
            if "B" in here and ("I" in here or "W" in here):
                faults.append(f"row {row}: stage {stage} micro-batch {m} has a whole and a split backward: {beside}")
                continue
            needed = "FIW" if "I" in here or "W" in here else "FB"
            absent = " and ".join(f"{stage}{kind}{m}" for kind in needed if kind not in here)
            faults.append(f"row {row}: {absent} is missing" + (f" ({beside})" if beside else ""))
    return faults


def _deadlock(schedule: Schedule, cells: dict[Action, _Cell]) -> list[str]:
    found = walk(schedule)
    if not found.waits:
        return []
    waits = [
        f"{cells[wait.action]}: {wait.action} waits for {wait.what} from row {wait.other + 1}" for wait in found.cycle()
    ]
    return ["deadlock: " + ", ".join(waits)]
