"""The real model's step, predicted from its pieces: each phase measured while only the ranks that it needs run."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from launcher.build import DTYPES, Run
from launcher.plan.measured.rest import frame_cpu, step_in_two
from launcher.plan.measured.row import Row, compared, over_ranks
from launcher.step import microbatch, train_step
from parallel.pipeline.phases import Phase, backward_program, forward_program
from parallel.plan.shared_cores import MeasuredCosts, PhaseKey, simulate_shared

BAR = 0.15
CHUNK_REPETITIONS = 5


def model_row(run: Run, *, repetitions: int) -> Row:
    """Predicts and measures a run's training step, a part of each in turns.

    Nothing of the steps that are measured is in the prediction: that is phases, each timed apart, put together by
    `simulate_shared`; then what follows on the pipeline, by the clock of steps that are taken in two; and the
    executor's messages and data, as processor time of a pipeline that computes nothing, shared evenly by the cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    train_step(run)  # allocates what stays
    steps, halves, frames, chunks = [], [], [], ChunkClock(run)
    gc.collect()
    gc.freeze()
    for _ in range(repetitions):
        chunks.measure()
        frames.append(frame_cpu(run, level=chunks.level))
        halves.append(step_in_two(run))
        dist.barrier()
        start = time.perf_counter()
        train_step(run)
        steps.append(over_ranks(time.perf_counter() - start, dist.ReduceOp.MAX))
    schedule, world = run.executor.schedule, run.config.parallel.world_size
    shared = simulate_shared(
        schedule, chunks.costs(), level=chunks.level, cores=cores, copies=run.config.parallel.data
    )  # fmt: skip
    after = statistics.median(half.after_seconds for half in halves)
    frame = statistics.median(frames) / min(cores, world)
    name = f"tiny: {schedule.name}, overlap={chunks.level}, {cores} core{'s' if cores > 1 else ''}"
    row = compared(name, steps, shared.seconds + after + frame, BAR)
    used = statistics.median(half.pipeline_cpu for half in halves)
    return replace(
        row,
        core_seconds=(used, shared.core_seconds),
        parts={"phases": shared.seconds, "after the pipeline": after, "messages and data": frame},
        phases_factor=(used - statistics.median(frames)) / shared.core_seconds,
    )


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
        latency = over_ranks(statistics.median(self._latency) if self._latency else 0.0) / dist.get_world_size()
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
