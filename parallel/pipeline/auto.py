"""`auto`: simulate every schedule that fits, take the fastest, and say why. No torch.

Deterministic: the same shape and costs give the same choice on every rank.
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from parallel.pipeline.actions import Action, Schedule
from parallel.pipeline.check import check
from parallel.pipeline.phase_costs import PhaseCosts
from parallel.pipeline.placement import copies
from parallel.pipeline.schedules import SCHEDULES, ScheduleError, build, stages_per_rank_of
from parallel.pipeline.simulate import Memory, StepCosts, peak_bytes, simulate
from parallel.pipeline.simulate_phases import simulate_phases

MOST_STAGES_PER_RANK = 4  # of interleaved; more stages mean more messages than a simulation without contention sees
_TIE = 1e-9  # relative


@dataclass(frozen=True)
class Fits:
    """What a schedule must keep to.

    num_layers: each stage needs one. stages: the number that is given, if layers were given by hand. live: most
    activations of a rank at once, in units of one micro-batch on all of a rank's layers. bytes: of a rank, with what
    `memory_of` counts. max_copies: ranks that may hold the same weight.
    """

    num_layers: int
    stages: int | None = None
    live: float | None = None
    bytes: float | None = None
    max_copies: int = 2


@dataclass(frozen=True)
class Phases:
    """The phases of the stages of a given schedule, and the overlap level at which they run: what the executor does."""

    costs_of: Callable[[Schedule], PhaseCosts]
    level: str


@dataclass(frozen=True)
class Candidate:
    """One schedule, simulated; or rejected, with the reason, as early as that was known.

    peak_live: as `Fits.live`. peak_bytes: None where no memory model was given. uneven: forward of the slowest stage
    over that of the mean stage.
    """

    name: str
    stages_per_rank: int
    rejected: str | None = None
    makespan: float | None = None
    bubble: float | None = None
    peak_live: float | None = None
    peak_bytes: float | None = None
    copies: int | None = None
    uneven: float | None = None

    @property
    def label(self) -> str:
        """The name, with the stages a rank where they can be chosen."""
        return f"{self.name} x{self.stages_per_rank}" if self.name == "interleaved" else self.name


@dataclass(frozen=True)
class Choice:
    """All candidates, the fastest first, those rejected last."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The one to run."""
        return self.candidates[0]

    def why(self) -> list[str]:
        """A table of at most 80 columns and a sentence: each candidate's figures, or why it cannot be had."""
        shortest = self.best.makespan or 1.0
        with_bytes = any(c.peak_bytes is not None for c in self.candidates)
        lines = ["schedule       makespan   ratio  bubble  uneven  live  copies" + ("     GiB" if with_bytes else "")]
        for c in self.candidates:
            if c.makespan is None:
                continue
            line = f"{c.label:<14}{c.makespan:9.4g}{c.makespan / shortest:8.3f}{c.bubble:8.1%}{c.uneven:8.2f}"
            line += f"{c.peak_live:6.3g}{c.copies:8}" + (f"{(c.peak_bytes or 0) / 2**30:8.1f}" if with_bytes else "")
            lines.append(line + ("  chosen" if c is self.best else ""))
        lines += [f"{c.label}: {c.rejected}" for c in self.candidates if c.rejected]
        return [*lines, *textwrap.wrap(self.reason(), 80)]

    def reason(self) -> str:
        """Why the best is the best, in a sentence."""
        best = self.best
        rivals = [c for c in self.candidates[1:] if not c.rejected]
        if not rivals:
            return f"{best.label} is the only schedule that fits"
        second = rivals[0]
        assert best.makespan is not None and second.makespan is not None
        if second.makespan - best.makespan <= _TIE * best.makespan:
            text = f"{best.label} ties with {second.label} and has fewer copies of weights or live activations"
            slower = [c for c in rivals if (c.makespan or 0.0) - best.makespan > _TIE * best.makespan]
            if slower and slower[0].makespan is not None:
                text += f"; {slower[0].label} takes {slower[0].makespan / best.makespan - 1:.1%} longer"
            return text
        gain = second.makespan / best.makespan - 1
        text = f"{best.label} is the fastest, {gain:.1%} before {second.label}"
        if best.copies == 2 and second.copies == 1:
            text += ", at the price of a second copy of the weights"
        if (second.uneven or 0) > 1.2 * (best.uneven or 0):
            text += f"; the layers divide worse over the stages of {second.label}, whose slowest takes"
            text += f" {second.uneven:.2f} of the mean, against {best.uneven:.2f}"
        return text


def choose(
    *,
    num_ranks: int,
    num_microbatches: int,
    fits: Fits,
    costs_of: Callable[[Schedule], StepCosts],
    memory_of: Callable[[Schedule], Memory] | None = None,
    phases: Phases | None = None,
) -> Choice:
    """The fastest schedule that fits; ties go to fewer copies of weights, then to fewer live activations.

    costs_of, memory_of: for the stages of a given schedule. phases: price the phases, with pairs and halves, instead of
    whole steps; costs_of then only says how even the stages are. ScheduleError if nothing fits.
    """
    found = [
        _judge(name, per_rank, num_ranks, num_microbatches, fits, costs_of, memory_of, phases)
        for name, per_rank in _shapes(num_ranks, fits)
    ]
    possible = sorted((c for c in found if not c.rejected), key=_rank_of)
    rejected = [c for c in found if c.rejected]
    if not possible:
        reasons = "; ".join(f"{c.label}: {c.rejected}" for c in rejected)
        raise ScheduleError(f"auto: no schedule fits {num_ranks} ranks and {num_microbatches} micro-batches: {reasons}")
    return Choice((*possible, *rejected))


def _rank_of(candidate: Candidate) -> tuple[float, int, float, int]:
    makespan, live = candidate.makespan or 0.0, candidate.peak_live or 0.0
    rounded = float(f"{makespan:.9g}")
    return (rounded, candidate.copies or 1, live, SCHEDULES.index(candidate.name))


def _shapes(num_ranks: int, fits: Fits) -> Iterator[tuple[str, int]]:
    """Names with their stages a rank."""
    for name in SCHEDULES:
        if name != "interleaved":
            yield name, stages_per_rank_of(name)
            continue
        most = max(2, min(MOST_STAGES_PER_RANK, fits.num_layers // num_ranks))
        yield from ((name, per_rank) for per_rank in range(2, most + 1))


def _judge(
    name: str,
    per_rank: int,
    num_ranks: int,
    num_microbatches: int,
    fits: Fits,
    costs_of: Callable[[Schedule], StepCosts],
    memory_of: Callable[[Schedule], Memory] | None,
    phases: Phases | None,
) -> Candidate:
    stages = num_ranks * per_rank
    if stages > fits.num_layers:
        return Candidate(name, per_rank, f"{stages} stages for {fits.num_layers} layers")
    if fits.stages is not None and stages != fits.stages:
        return Candidate(name, per_rank, f"{stages} stages, layers are given for {fits.stages}")
    wanted = per_rank if name == "interleaved" else None
    try:
        schedule = build(name, num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=wanted)
    except ScheduleError as error:
        return Candidate(name, per_rank, str(error))
    costs = costs_of(schedule)
    live = max(check(schedule).live_activations) / per_rank
    held = max(peak_bytes(schedule, memory_of(schedule))) if memory_of else None
    copied = copies(schedule.placement)
    reason = None
    if fits.live is not None and live > fits.live:
        reason = f"{live:g} live activations, {fits.live:g} allowed"
    elif fits.bytes is not None and held is not None and held > fits.bytes:
        reason = f"{held / 2**30:.1f} GiB on its fullest rank, {fits.bytes / 2**30:.1f} allowed"
    elif copied > fits.max_copies:
        reason = f"{copied} copies of the weights, {fits.max_copies} allowed"
    if reason:
        return Candidate(name, per_rank, reason, peak_live=live, peak_bytes=held, copies=copied)
    if phases is None:
        timeline = simulate(schedule, costs)
    else:
        timeline = simulate_phases(schedule, phases.costs_of(schedule), level=phases.level)
    forwards = [costs.of_step(Action("F", stage, 0)) for stage in range(stages)]
    uneven = max(forwards) * stages / sum(forwards) if any(forwards) else 1.0
    return Candidate(name, per_rank, None, timeline.makespan, timeline.bubble, live, held, copied, uneven)
