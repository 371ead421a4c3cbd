"""A rank of `expertpipe plan --validate --measured`: what a step was predicted to take, and what it takes.

`slept`: pipelines whose chunks sleep, predicted by the planner's simulator. `model`: the real model, predicted from its
phases, each measured while only the ranks that it needs run.
"""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.bench.pipeline import Lanes, make_lanes
from launcher.bench.step import build_for_bench
from launcher.build import DTYPES, Run
from launcher.check.run import checked
from launcher.config import TrainConfig
from launcher.plan.inputs import hardware_of, of_config, shipped
from launcher.runtime import process_group
from launcher.step import microbatch, train_step
from model.transformer import Microbatch
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.phases import Phase, backward_program, forward_program
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate_phases import simulate_phases
from parallel.pipeline.slept import SleptDevice, SleptStages, sleep_precisely
from parallel.plan.cost import price
from parallel.plan.shared_cores import MeasuredCosts, PhaseKey, simulate_shared

SLEPT_BAR, MODEL_BAR = 0.05, 0.15
UNIT_SECONDS = 0.02  # a chunk's forward, in the pipelines with costs of their own
CHUNK_REPETITIONS = 5


@dataclass(frozen=True)
class Row:
    """One comparison, in seconds. bar: largest relative error that holds. spread: (longest - shortest) / median.

    core_seconds: processor seconds of all ranks in the pipeline, measured and predicted, which tell the cost of the
    pieces from how they fall together, and which other programs do not disturb. None where the ranks sleep.
    """

    check: str
    measured: float
    predicted: float
    bar: float
    spread: float
    core_seconds: tuple[float, float] | None = None

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


# --- pipelines that sleep ----------------------------------------------------------------------------------------


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
            longest = _over_ranks(time.perf_counter() - start, dist.ReduceOp.MAX)
            seconds += [longest] * (repetition > 0)
    for one, seconds in zip(pipelines, taken, strict=True):
        predicted = simulate_phases(one.schedule, one.costs, level=one.overlap).makespan
        yield _row(one.check, seconds, predicted, SLEPT_BAR)


def _sleeping(one: Slept, rank: int, lanes: Lanes) -> Callable[[], None]:
    """A rank's step: the real executor over stages that sleep."""
    device = SleptDevice(serial=one.overlap == "off")
    executor = Executor(
        one.schedule,
        Mesh(ParallelConfig(one.schedule.num_ranks, schedule=one.schedule.name), rank),
        lanes,
        SleptStages(one.costs, num_stages=one.schedule.num_stages, device=device),
        dtype=torch.float32,
        device=torch.device("cpu"),
        overlap=one.overlap,
    )

    def step() -> None:
        executor.step(lambda number: Microbatch(torch.full((1, 2), number)))
        device.synchronize()

    return step


def _row(check: str, seconds: Sequence[float], predicted: float, bar: float) -> Row:
    median = statistics.median(seconds)
    return Row(check, median, predicted, bar, (max(seconds) - min(seconds)) / median)


# --- the model ---------------------------------------------------------------------------------------------------


def model_row(run: Run, *, repetitions: int) -> Row:
    """Predicts and measures a run's training step, a part of each in turns.

    What a step computes outside of its chunks' phases (messages, data, reductions, update) is not timed piece by piece:
    it is the processor time of the step less that of the phases, shared evenly by the cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    train_step(run)  # allocates what stays
    steps, pipelines, wholes, chunks = [], [], [], ChunkClock(run)
    gc.collect()
    gc.freeze()
    for _ in range(repetitions):
        chunks.measure()
        dist.barrier()
        cpu, start = time.process_time(), time.perf_counter()
        train_step(run)
        seconds, whole = time.perf_counter() - start, time.process_time() - cpu
        steps.append(_over_ranks(seconds, dist.ReduceOp.MAX))
        wholes.append(_over_ranks(whole))
        pipelines.append(_over_ranks(_pipeline_cpu(run)))
    costs = chunks.costs()
    schedule, overlap = run.executor.schedule, chunks.level
    shared = simulate_shared(schedule, costs, level=overlap, cores=cores, copies=run.config.parallel.data)
    rest = max(0.0, statistics.median(wholes) - shared.core_seconds) / min(cores, run.config.parallel.world_size)
    name = f"tiny: {schedule.name}, overlap={overlap}, {cores} core{'s' if cores > 1 else ''}"
    row = _row(name, steps, shared.seconds + rest, MODEL_BAR)
    return replace(row, core_seconds=(statistics.median(pipelines), shared.core_seconds))


def _over_ranks(value: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return tensor.item()


def _pipeline_cpu(run: Run) -> float:
    """Processor seconds of this rank in the pipeline of a step alone; its gradients are forgotten."""
    dist.barrier()
    cpu = time.process_time()
    run.executor.step(lambda number: microbatch(run, number))
    used = time.process_time() - cpu
    _forget(run)
    return used


def _forget(run: Run) -> None:
    """Gradients and counts that no update is to see."""
    run.zero1.zero_gradients()
    for shared in run.model.routers.values():
        shared.router.reset()
    run.clock.take_rows()


class ChunkClock:
    """Processor seconds of every phase of this rank's chunks, measured while one pipeline rank after the other runs.

    The data ranks of a pipeline rank run together, as their experts need each other; all others wait meanwhile.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        parallel = run.config.parallel
        self.level = parallel.overlap if parallel.expert > 1 else "off"
        self._own: dict[PhaseKey, list[float]] = {}
        self._beside: dict[PhaseKey, list[float]] = {}
        self._put_off: dict[PhaseKey, list[float]] = {}
        self._asleep: dict[PhaseKey, list[float]] = {}
        self._latency: list[float] = []

    def measure(self) -> None:
        """A few chunks of every stage, whole and in the parts in which the schedule has them."""
        run = self._run
        for turn in range(run.config.parallel.pipeline):
            dist.barrier()
            if turn != run.mesh.pipeline_rank:
                continue
            for stage in run.model.stages:
                for halves in sorted({run.executor.halves.get((stage, n), 1) for n in _numbers(run, stage)}):
                    for _ in range(CHUNK_REPETITIONS):
                        self._chunk(stage, halves)
        dist.barrier()
        _forget(run)

    def costs(self) -> MeasuredCosts:
        """Medians over repetitions, means over the ranks that hold a stage; the same on every rank."""
        mine = [
            {key: statistics.median(values) for key, values in found.items()}
            for found in (self._own, self._beside, self._put_off, self._asleep)
        ]
        links = {stage: self._run.executor.stages.num_links(stage) for stage in self._run.model.stages}
        gathered: list[tuple[list[dict[PhaseKey, float]], dict[int, int]]] = [([], {})] * dist.get_world_size()
        dist.all_gather_object(gathered, (mine, links))
        tables = [_mean([tables[i] for tables, _ in gathered]) for i in range(len(mine))]
        latency = _over_ranks(statistics.median(self._latency) if self._latency else 0.0) / dist.get_world_size()
        return MeasuredCosts({k: v for _, links in gathered for k, v in links.items()}, *tables, latency=latency)

    def _chunk(self, stage: int, halves: int) -> None:
        run, stages = self._run, self._run.executor.stages
        links = stages.num_links(stage)
        batch = microbatch(run, 0)
        shape = (batch.tokens.shape[0], batch.tokens.shape[1] - 1, stages.hidden_size)
        given = [torch.randn(shape, dtype=DTYPES[run.config.train.precision]) for _ in range(2)]
        chunk = stages.new_chunk(stage, batch, halves)
        chunk.begin(None if stage == 0 else given[0])
        self._program(forward_program(links, halves=halves), chunk.run, stage, halves)
        chunk.begin_backward(None if run.model.stages[stage].is_last else given[1])
        self._program(backward_program(links, halves=halves, weights=True), chunk.run, stage, halves)

    def _program(self, program: Sequence[Phase], run: Callable[[Phase], None], stage: int, halves: int) -> None:
        """Times a program. What other threads use is spread over its transfers, or is the only phase's own.

        So is what remains of the time that passes, in which nobody of this rank has anything to do: its peer's work and
        what it takes to be woken.
        """
        others, began, mine = time.process_time() - time.thread_time(), time.perf_counter(), time.thread_time()
        waiting: list[PhaseKey] = []  # phases whose weight gradients no `weights` has computed yet
        for phase in program:
            key = PhaseKey(stage, halves, phase.kind, phase.link)
            start = time.thread_time()
            run(phase)
            seconds = time.thread_time() - start
            if phase.kind != "weights":
                self._own.setdefault(key, []).append(seconds)
                waiting += [key] * phase.kind.endswith("_grad") * (not phase.is_transfer)
                continue
            due = [one for one in waiting if one.link >= phase.link]
            waiting = [one for one in waiting if one.link < phase.link]
            if due:  # most of it is the latest one's, and they are never computed apart
                parts = due.count(due[-1])
                self._put_off.setdefault(due[-1], []).append(seconds / parts)
        beside = max(0.0, time.process_time() - time.thread_time() - others)
        asleep = max(0.0, time.perf_counter() - began - (time.thread_time() - mine) - beside)
        transfers = [phase for phase in program if phase.is_transfer]
        for phase in transfers:
            key = PhaseKey(stage, halves, phase.kind, phase.link)
            self._beside.setdefault(key, []).append(beside / len(transfers))
        if transfers:
            self._latency.append(asleep / len(transfers))
        else:
            first = PhaseKey(stage, halves, program[0].kind, program[0].link)
            self._own[first][-1] += beside
            self._asleep.setdefault(first, []).append(asleep)


def _numbers(run: Run, stage: int) -> list[int]:
    """Micro-batches that this rank's schedule has on a stage."""
    tasks = run.executor.tasks
    return sorted({action.microbatch for task in tasks for action in task.actions if action.stage == stage})


def _mean(tables: Sequence[dict[PhaseKey, float]]) -> dict[PhaseKey, float]:
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: statistics.fmean(table[key] for table in tables if key in table) for key in keys}


# --- the process -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """OUT REPETITIONS slept | planned | model SCHEDULE OVERLAP: rank 0 adds its rows to OUT as lines of JSON."""
    out, repetitions, kind, *words = argv
    if kind == "model":
        schedule, overlap = words
        overrides = ["experiment=tiny", f"parallel.schedule={schedule}", f"parallel.overlap={overlap}"]
        config = checked([*overrides, "train.device=cpu", "train.threads=1"], with_data=False)
        with process_group(config.train) as process:
            rows = [model_row(build_for_bench(config, process), repetitions=int(repetitions))]
            _write(Path(out), rows, process.rank)
        return 0
    with process_group(TrainConfig(1, 1, device="cpu", threads=1, timeout_seconds=300)) as process:
        pipelines = even_pipelines() if kind == "slept" else planned_pipelines()
        _write(Path(out), list(slept_rows(pipelines, process.rank, repetitions=int(repetitions))), process.rank)
    return 0


def _write(path: Path, rows: Sequence[Row], rank: int) -> None:
    if rank == 0:
        with path.open("a") as file:
            file.writelines(json.dumps(row.tree()) + "\n" for row in rows)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
