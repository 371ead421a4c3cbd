"""Pipelines whose chunks sleep, predicted by the planner's simulator and run by the executor."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from launcher.bench.pipeline import Lanes, make_lanes
from launcher.check.run import checked
from launcher.plan.inputs import hardware_of, of_config, shipped
from launcher.plan.measured.row import Row, compared, over_ranks
from model.transformer import Microbatch
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate_phases import simulate_phases
from parallel.pipeline.slept import SleptDevice, SleptStages, sleep_precisely
from parallel.pipeline.slept_lanes import SleptLanes
from parallel.plan.cost import price

BAR = 0.05
UNIT_SECONDS = 0.02  # a chunk's forward, in the pipelines with costs of their own


@dataclass(frozen=True)
class Slept:
    """A pipeline to be slept through. overlap: level; costs: of its stages, in seconds."""

    check: str
    schedule: Schedule
    costs: PhaseCosts
    overlap: str


def even_pipelines(unit_seconds: float = UNIT_SECONDS) -> list[Slept]:
    """Every kind of schedule on 4 ranks with 12 micro-batches: as they are, and with as much all-to-all as work."""
    found = []
    for name, transfer, level in (
        ("gpipe", 0.0, "off"), ("1f1b", 0.0, "off"), ("interleaved", 0.0, "off"), ("zb1p", 0.0, "off"),
        ("zbv", 0.0, "off"), ("dualpipev", 0.0, "off"), ("dualpipe", 0.0, "off"),
        ("1f1b", 1.0, "all"), ("zbv", 1.0, "all"), ("dualpipe", 1.0, "pairs"), ("dualpipe", 1.0, "all"),
    ):  # fmt: skip
        schedule = build(name, num_ranks=4, num_microbatches=12)
        seconds = unit_seconds * 8 / schedule.num_stages
        costs = PhaseCosts(LayerCosts.even(seconds, seconds * transfer))
        if not transfer:
            costs = PhaseCosts(LayerCosts.even(0.0, 0.0), 0, end=seconds, end_grad=seconds, end_weights=seconds)
        words = f", overlap={level}" if transfer else ""
        found.append(Slept(f"slept: {name}{words}", schedule, costs, level))
    return found


def planned_pipelines() -> list[Slept]:
    """DeepSeek-V3 on H800 with the planner's own seconds of every phase of its uneven stages, on 8 pipeline ranks."""
    words = ["experiment=deepseek_v3_2048_h800", "parallel.pipeline=8", "parallel.data=64"]
    config = checked([*words, f"train.global_batch_size={64 * 16}"], with_data=False, here=False)
    job = replace(of_config(config, hardware_of("h800")), calibration=shipped())
    found = []
    for name, level in (("1f1b", "all"), ("dualpipe", "pairs"), ("dualpipe", "all")):
        schedule = build(name, num_ranks=8, num_microbatches=job.num_microbatches)
        costs = price(schedule, job.stages(schedule), job.shape(), job.hardware, job.calibration)
        # nothing sleeps through a message, and a stage that sleeps has one cost, in a pair or alone
        costs = replace(costs, message=0.0, single=frozenset())
        found.append(Slept(f"slept: DeepSeek-V3, {name}, overlap={level}", schedule, costs, level))
    return found


def slept_rows(pipelines: Sequence[Slept], rank: int, *, repetitions: int) -> Iterator[Row]:
    """All of them in turns, on all ranks; the first round warms up."""
    sleep_precisely()
    lanes = make_lanes()
    steps = [_sleeping(one, rank, lanes) for one in pipelines]
    taken: list[list[float]] = [[] for _ in steps]
    gc.collect()
    gc.freeze()  # what was imported is never looked through again
    for repetition in range(repetitions + 1):
        for step, seconds in zip(steps, taken, strict=True):
            dist.barrier()
            start = time.perf_counter()
            step()
            longest = over_ranks(time.perf_counter() - start, dist.ReduceOp.MAX)
            seconds += [longest] * (repetition > 0)
    for one, seconds in zip(pipelines, taken, strict=True):
        predicted = simulate_phases(one.schedule, one.costs, level=one.overlap).makespan
        yield compared(one.check, seconds, predicted, BAR)


def _sleeping(one: Slept, rank: int, lanes: Lanes) -> Callable[[], None]:
    """A rank's step: the real executor over stages that sleep, whose sends leave as on a GPU."""
    device = SleptDevice(serial=one.overlap == "off", sends=True)
    executor = Executor(
        one.schedule,
        Mesh(ParallelConfig(one.schedule.num_ranks, schedule=one.schedule.name), rank),
        SleptLanes(lanes, device),
        SleptStages(one.costs, num_stages=one.schedule.num_stages, device=device),
        dtype=torch.float32,
        device=torch.device("cpu"),
        overlap=one.overlap,
    )

    def step() -> None:
        executor.step(lambda number: Microbatch(torch.full((1, 2), number)))
        device.synchronize()

    return step
