"""Schedules as pure functions: shape of the pipeline in, every rank's list of actions out. No torch."""

from collections.abc import Callable
from pathlib import Path

from parallel.pipeline.actions import Schedule
from parallel.pipeline.csv_format import read
from parallel.pipeline.schedules.dualpipe import dualpipe
from parallel.pipeline.schedules.one_way import gpipe, interleaved, one_f_one_b, zb1p
from parallel.pipeline.schedules.v_shape import dualpipev, zbv


class ScheduleError(ValueError):
    """A schedule that cannot exist; the message names the constraint and the nearest that works."""

    user_error = True


_BUILDERS: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "zbv": zbv,
    "dualpipev": dualpipev,
    "dualpipe": dualpipe,
}
SCHEDULES = tuple(_BUILDERS)
V_SHAPED = ("zbv", "dualpipev")
DEFAULT_STAGES_PER_RANK = 2  # of interleaved


def build(name: str, *, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """The schedule `name` of num_ranks pipeline ranks and num_microbatches (both directions together).

    name: one of SCHEDULES, or a file that ends in .csv (see `csv_format`). stages_per_rank: for interleaved, 2 where
    None. ScheduleError where it does not exist, with the nearest shape that does.
    """
    per_rank = validate(name, num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=stages_per_rank)
    if is_file(name):
        return load(name)
    extra = {"stages_per_rank": per_rank} if name == "interleaved" else {}
    return _BUILDERS[name](num_ranks=num_ranks, num_microbatches=num_microbatches, **extra)


def validate(name: str, *, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> int:
    """Raises what `build` would, without building; gives the stages that a micro-batch visits on each rank."""
    if not is_file(name) and name not in _BUILDERS:
        raise ScheduleError(f"schedule {name!r} does not exist: choose from {', '.join(SCHEDULES)}, or a .csv file")
    if num_ranks < 1 or num_microbatches < 1:
        raise ScheduleError(f"{name} needs at least 1 rank and 1 micro-batch, not {num_ranks} and {num_microbatches}")
    if is_file(name):
        return _validate_file(name, num_ranks, num_microbatches)
    if name == "dualpipe" and num_ranks % 2:
        near = "2" if num_ranks == 1 else f"{num_ranks - 1} or {num_ranks + 1}"
        raise ScheduleError(
            f"dualpipe pairs the two halves of the pipeline, so its ranks must be even, not {num_ranks}: "
            f"use {near} ranks, or dualpipev or zbv on {num_ranks}"
        )
    return stages_per_rank_of(name, stages_per_rank)


def stages_per_rank_of(name: str, wanted: int | None = None) -> int:
    """Stages of a rank that one micro-batch visits; ScheduleError where `wanted` cannot be had."""
    if is_file(name):
        schedule = load(name)
        return schedule.num_stages // schedule.num_ranks
    if name == "interleaved":
        if wanted is not None and wanted < 1:
            raise ScheduleError(f"{name} needs at least 1 stage a rank, not {wanted}: use {DEFAULT_STAGES_PER_RANK}")
        return DEFAULT_STAGES_PER_RANK if wanted is None else wanted
    fixed = 2 if name in V_SHAPED else 1
    if wanted not in (None, fixed):
        number = "2 stages" if fixed == 2 else "1 stage"
        raise ScheduleError(f"{name} has {number} a rank, not {wanted}: use {fixed}, or interleaved")
    return fixed


def is_file(name: str) -> bool:
    """Whether the name of a schedule means a file."""
    return name.endswith(".csv")


def load(name: str) -> Schedule:
    """The schedule of a file, whatever its shape."""
    try:
        text = Path(name).read_text()
    except OSError as error:
        raise ScheduleError(f"{name}: {error.strerror or error}: give the path of a schedule in CSV") from error
    return read(text, name=name)


def _validate_file(name: str, num_ranks: int, num_microbatches: int) -> int:
    schedule = load(name)
    has, wanted = (schedule.num_ranks, schedule.num_microbatches), (num_ranks, num_microbatches)
    if has != wanted:
        raise ScheduleError(
            f"{name} is for {has[0]} ranks and {has[1]} micro-batches, not {wanted[0]} and {wanted[1]}: "
            f"use {has[0]} ranks and {has[1]} micro-batches"
        )
    return schedule.num_stages // schedule.num_ranks
