"""The rows of `expertpipe bench pipeline`: which schedule, how large, at what cost, and what it ideally takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from launcher.bench import pipeline_model
from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import Fits, Phases, choose
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.simulate_phases import simulate_phases

CLOCKS = ("blocking", "stream", "nccl")
GROUPS = ("engine8", "engine16", "auto16", "alltoall32", "alltoall64", "alltoall120", "model")
START_SECONDS = {8: 12, 16: 25}  # of so many processes on two cores, roughly
MODEL_SECONDS = 20  # a schedule of the tiny model on four processes, start included, roughly


@dataclass(frozen=True)
class Case:
    """One row to measure.

    The model is 2 * ranks chunks whose forward takes cost_ms, as do input gradient and weight gradient; a stage of a
    schedule with fewer stages has several. all_to_all: transfers of F and of I in units of their computation, half
    to the experts and half back. overlap: see `parallel.pipeline.overlap`. clock: `blocking`, `stream` or `nccl`, see
    `parallel.pipeline.slept` and `slept_lanes`; torch's engine sends through torch.distributed, so never `nccl`.
    """

    engine: str
    schedule: str
    ranks: int
    microbatches: int
    cost_ms: float
    all_to_all: float = 0.0
    overlap: str = "off"
    clock: str = "stream"
    group: str = ""


def default_cases() -> list[Case]:
    """The published comparison: engine overhead, `auto` without all-to-all, and all-to-all as long as computation."""
    cases: list[Case] = []
    for ranks, microbatches, cost in ((8, 20, 20.0), (16, 32, 50.0)):
        group = f"engine{ranks}"
        for name in ("dualpipe", "dualpipev", "zbv", "1f1b", "auto"):
            cases.append(Case("expertpipe", name, ranks, microbatches, cost, group=group))
        for name in ("dualpipev", "zbv", "1f1b"):
            cases.append(Case("torch", name, ranks, microbatches, cost, group=group))
    cases.append(Case("expertpipe", "auto", 16, 32, 50.0, clock="nccl", group="auto16"))
    for microbatches in (32, 64, 120):
        group = f"alltoall{microbatches}"
        base = Case(
            "expertpipe", "dualpipe", 16, microbatches, 50.0, all_to_all=1.0, overlap="all", clock="nccl", group=group
        )
        cases.append(base)
        if microbatches == 32:
            cases += [replace(base, overlap="pairs"), replace(base, schedule="dualpipev")]
    return cases


@lru_cache(maxsize=64)
def schedule_of(case: Case) -> Schedule:
    """The schedule, chosen by simulation where it is `auto`."""
    name, per_rank = case.schedule, None
    if name == "auto":
        best = choose(
            num_ranks=case.ranks,
            num_microbatches=case.microbatches,
            fits=Fits(num_layers=4 * case.ranks),
            costs_of=lambda schedule: Costs(*[_stage_seconds(case, schedule.num_stages)] * 3),
            phases=Phases(lambda schedule: costs_of(case, schedule.num_stages), case.overlap),
        ).best
        name, per_rank = best.name, best.stages_per_rank if best.name == "interleaved" else None
    return build(name, num_ranks=case.ranks, num_microbatches=case.microbatches, stages_per_rank=per_rank)


def costs_of(case: Case, num_stages: int) -> PhaseCosts:
    """Costs of a stage of a schedule with so many stages, in seconds; one piece where nothing is transferred."""
    seconds = _stage_seconds(case, num_stages)
    layer = LayerCosts.even(seconds, seconds * case.all_to_all)
    if case.all_to_all:
        return PhaseCosts(layer)
    return PhaseCosts(layer, num_layers=0, end=seconds, end_grad=seconds, end_weights=seconds)


def _stage_seconds(case: Case, num_stages: int) -> float:
    return case.cost_ms / 1000 * 2 * case.ranks / num_stages


def ideal(case: Case) -> float:
    """Seconds of the schedule as its engine orders it, with nothing but the costs.

    torch sends a gradient when the whole backward is done, ours ahead of the weight gradients: a shorter ideal.
    """
    schedule = schedule_of(case)
    if case.engine == "torch":
        return simulate(schedule, Costs(*[_stage_seconds(case, schedule.num_stages)] * 3)).makespan
    return simulate_phases(schedule, costs_of(case, schedule.num_stages), level=case.overlap).makespan


def estimate(cases: Sequence[Case], repetitions: int) -> dict[str, float]:
    """Seconds of each group of the cases, its processes' start included."""
    found: dict[str, float] = {}
    for case in cases:
        start = 0.0 if case.group in found else START_SECONDS.get(case.ranks, case.ranks)
        found[case.group] = found.get(case.group, 0.0) + start + (repetitions + 1) * ideal(case)
    return found


def model_estimate() -> float:
    """Seconds of the group `model`."""
    return MODEL_SECONDS * len(pipeline_model.cases())
