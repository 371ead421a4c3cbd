"""`expertpipe bench pipeline`: the executor on slept costs against the simulated ideal and against torch's engine.

Stages sleep (`parallel.pipeline.slept`), so that two cores suffice for sixteen ranks: what is measured beyond the
ideal is what the engine itself costs. All engines take turns in the same processes.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.bench import pipeline_model
from launcher.bench.pipeline_torch import TorchEngine
from launcher.config import TrainConfig
from launcher.local import run_local
from launcher.runtime import process_group
from launcher.start import outer_world_size
from model.transformer import Microbatch
from parallel.config import ParallelConfig
from parallel.mesh import Groups, Mesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import Fits, choose
from parallel.pipeline.executor import Executor
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import Costs
from parallel.pipeline.simulate_phases import simulate_phases
from parallel.pipeline.slept import SleptStages, sleep_precisely

TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Case:
    """One row to measure.

    The model is 2 * ranks chunks whose forward takes cost_ms, as do input gradient and weight gradient; a stage of a
    schedule with fewer stages has several. all_to_all: transfers of F and of I in units of their computation, half
    to the experts and half back. overlap: see `parallel.pipeline.overlap`.
    """

    engine: str
    schedule: str
    ranks: int
    microbatches: int
    cost_ms: float
    all_to_all: float = 0.0
    overlap: str = "off"


@dataclass(frozen=True)
class Row:
    """What was measured: medians over the repetitions, of the slowest rank; ideal_ms from the simulator.

    units: measured in units of one chunk's forward. spread: (longest - shortest) / median. resolved: the schedule that
    `auto` took.
    """

    engine: str
    schedule: str
    ranks: int
    microbatches: int
    cost_ms: float
    all_to_all: float
    overlap: str
    resolved: str
    ideal_ms: float
    measured_ms: float
    ratio: float
    units: float
    spread: float
    peak_live_activations: int | None
    allowed_live_activations: int | None
    repetitions: int


def default_cases(groups: Sequence[str]) -> list[Case]:
    """The published comparison: engine overhead, all-to-all as long as computation, and `auto` without it."""
    cases: list[Case] = []
    ours = ("dualpipe", "dualpipev", "zbv", "1f1b", "auto")
    for ranks, microbatches, cost in ((8, 20, 20.0), (16, 32, 50.0)):
        if f"engine{ranks}" in groups:
            cases += [Case("expertpipe", name, ranks, microbatches, cost) for name in ours]
            cases += [Case("torch", name, ranks, microbatches, cost) for name in ("dualpipev", "zbv", "1f1b")]
    if "alltoall" in groups:
        for microbatches in (32, 64, 120):
            base = Case("expertpipe", "dualpipe", 16, microbatches, 20.0, all_to_all=1.0, overlap="all")
            cases += [base, replace(base, overlap="pairs"), replace(base, schedule="dualpipev")]
    return cases


GROUPS = ("engine8", "engine16", "alltoall", "model")


def schedule_of(case: Case) -> Schedule:
    """The schedule, chosen by simulation where it is `auto`."""
    name, per_rank = case.schedule, None
    if name == "auto":
        best = choose(
            num_ranks=case.ranks,
            num_microbatches=case.microbatches,
            fits=Fits(num_layers=4 * case.ranks),
            costs_of=lambda schedule: Costs(*[2 * case.ranks / schedule.num_stages] * 3),
        ).best
        name, per_rank = best.name, best.stages_per_rank if best.name == "interleaved" else None
    return build(name, num_ranks=case.ranks, num_microbatches=case.microbatches, stages_per_rank=per_rank)


def costs_of(case: Case, num_stages: int) -> PhaseCosts:
    """Costs of a stage of a schedule with so many stages, in seconds; one piece where nothing is transferred."""
    seconds = case.cost_ms / 1000 * 2 * case.ranks / num_stages
    layer = LayerCosts.even(seconds, seconds * case.all_to_all)
    if case.all_to_all:
        return PhaseCosts(layer)
    return PhaseCosts(layer, num_layers=0, end=seconds, end_grad=seconds, end_weights=seconds)


@dataclass(frozen=True)
class _Prepared:
    """A case ready to run on this rank; peak: live activations measured and allowed here."""

    case: Case
    resolved: str
    ideal: float
    step: Callable[[], object]
    peak: Callable[[], tuple[int, int] | None]


def _prepare(case: Case, rank: int) -> _Prepared:
    if case.engine == "torch":
        num_stages = case.ranks * (1 if case.schedule == "1f1b" else 2)
        costs = costs_of(case, num_stages)
        schedule = build(case.schedule, num_ranks=case.ranks, num_microbatches=case.microbatches)
        engine = TorchEngine(case.schedule, num_microbatches=case.microbatches, costs=costs)
        return _Prepared(case, case.schedule, _ideal(schedule, costs, case), engine.step, lambda: None)
    schedule = schedule_of(case)
    costs = costs_of(case, schedule.num_stages)
    mesh = Mesh(ParallelConfig(case.ranks, schedule=schedule.name), rank)
    groups = Groups(mesh, {schedule.holders(stage) for stage in range(schedule.num_stages)}, timeout=TIMEOUT)
    stages = SleptStages(costs, num_stages=schedule.num_stages, serial=case.overlap == "off")
    executor = Executor(
        schedule, mesh, groups, stages, dtype=torch.float32, device=torch.device("cpu"), overlap=case.overlap
    )

    def step() -> None:
        losses = executor.step(lambda number: Microbatch(torch.full((1, 2), number)))
        assert all(float(loss.main) for number, loss in losses.items() if number), "a loss is missing"

    return _Prepared(
        case, schedule.name, _ideal(schedule, costs, case), step, lambda: (executor.peak_live, executor.peak_allowed)
    )


def _ideal(schedule: Schedule, costs: PhaseCosts, case: Case) -> float:
    return simulate_phases(schedule, costs, level=case.overlap).makespan


def _measure(prepared: Sequence[_Prepared], repetitions: int) -> list[Row]:
    """All cases in turns; every rank gets all rows."""
    taken: list[list[float]] = [[] for _ in prepared]
    for repetition in range(repetitions + 1):
        for one, times in zip(prepared, taken, strict=True):
            dist.barrier()
            start = time.perf_counter()
            one.step()
            seconds = torch.tensor([time.perf_counter() - start])
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if repetition:  # the first warms up
                times.append(seconds.item())
    return [_row(one, times) for one, times in zip(prepared, taken, strict=True)]


def _row(prepared: _Prepared, times: list[float]) -> Row:
    peak = torch.tensor(prepared.peak() or (0, 0))
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    median = statistics.median(times)
    live, allowed = (int(value) or None for value in peak)
    return Row(
        **asdict(prepared.case),
        resolved=prepared.resolved,
        ideal_ms=1000 * prepared.ideal,
        measured_ms=1000 * median,
        ratio=median / prepared.ideal,
        units=1000 * median / prepared.case.cost_ms,
        spread=(max(times) - min(times)) / median,
        peak_live_activations=live,
        allowed_live_activations=allowed,
        repetitions=len(times),
    )


def _as_rank(cases: Sequence[Case], repetitions: int, out: Path) -> int:
    """What each process does: measure the cases for as many ranks as there are."""
    with process_group(TrainConfig(1, 1, device="cpu", threads=1, timeout_seconds=120)) as process:
        sleep_precisely()
        prepared = [_prepare(case, process.rank) for case in cases if case.ranks == process.world_size]
        rows = _measure(prepared, repetitions)
        if process.rank == 0:
            out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return 0


def bench_pipeline(argv: list[str]) -> int:
    """`expertpipe bench pipeline [--json] [--groups ...] [--repetitions N]`; starts its own processes."""
    parser = ArgumentParser(prog="expertpipe bench pipeline", description=__doc__)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="which rows (default all)")
    parser.add_argument("--repetitions", type=int, default=5, help="after one to warm up (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply all costs, e.g. 0.2 for a quick look")
    parser.add_argument("--out", type=Path, help="for the ranks: where rank 0 writes the rows")
    parser.add_argument("--model", nargs=2, metavar=("SCHEDULE", "OVERLAP"), help="for the ranks: the row to measure")
    arguments = parser.parse_args(argv)
    cases = [replace(case, cost_ms=case.cost_ms * arguments.scale) for case in default_cases(arguments.groups)]
    if outer_world_size(os.environ) is not None and arguments.out is not None:
        if arguments.model:
            schedule, overlap = arguments.model
            return pipeline_model.measure_as_rank(schedule, overlap, arguments.repetitions, arguments.out)
        return _as_rank(cases, arguments.repetitions, arguments.out)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({case.ranks for case in cases}):
            print(f"{ranks} ranks ...", file=sys.stderr)
            out = Path(folder) / "rows.jsonl"
            rank_argv = ["bench", "pipeline", *argv, "--out", str(out)]
            code = run_local(rank_argv, world_size=ranks, run_dir=Path(folder), threads=1)
            if code:
                return code
            rows += [json.loads(line) for line in out.read_text().splitlines()]
        models: list[dict[str, object]] = []
        if "model" in arguments.groups:
            print("tiny model under every schedule ...", file=sys.stderr)
            models = pipeline_model.measure(arguments.repetitions, Path(folder))
    lines = _table(rows) * bool(rows) + pipeline_model.table(models) * bool(models)
    for line in map(json.dumps, rows + models) if arguments.json else lines:
        print(line)
    return 0


def _table(rows: Sequence[dict[str, object]]) -> list[str]:
    head = f"{'engine':<11}{'schedule':<15}{'P':>3}{'M':>5}{'ms':>5} {'overlap':<7}{'ideal':>8}{'measured':>9}"
    lines = [head + f"{'ratio':>6}{'units':>7}{'live':>5}"]
    for row in rows:
        name = str(row["schedule"])
        if name == "auto":
            name = f"auto={row['resolved']}"
        live = "" if row["peak_live_activations"] is None else row["peak_live_activations"]
        overlap = row["overlap"] if row["all_to_all"] else "-"
        lines.append(
            f"{row['engine']:<11}{name:<15}{row['ranks']:>3}{row['microbatches']:>5}{row['cost_ms']:>5.3g} {overlap:<7}"
            f"{row['ideal_ms']:>8.0f}{row['measured_ms']:>9.0f}{row['ratio']:>6.3f}{row['units']:>7.1f}{live:>5}"
        )
    return lines
