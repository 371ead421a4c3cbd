"""`expertpipe bench pipeline`: the executor on slept costs against the simulated ideal and against torch's engine.

Stages sleep (`parallel.pipeline.slept`), so that two cores suffice for sixteen ranks: what is measured beyond the
ideal is what the engine itself costs. The rows of a group take turns in the same processes; rank 0 prints each row as
soon as its group is done, so that nothing measured is lost when the rest is stopped.
"""

import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.bench import pipeline_model
from launcher.bench.pipeline_cases import (
    CLOCKS,
    GROUPS,
    Case,
    costs_of,
    default_cases,
    estimate,
    ideal,
    model_estimate,
    schedule_of,
)
from launcher.bench.pipeline_torch import TorchEngine
from launcher.config import TrainConfig
from launcher.local import run_local
from launcher.runtime import process_group
from launcher.start import outer_world_size
from model.transformer import Microbatch
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.pipeline.executor import Executor
from parallel.pipeline.slept import SleptDevice, SleptStages, sleep_precisely
from parallel.pipeline.slept_lanes import SleptLanes

USER_ERROR = 2


@dataclass(frozen=True)
class Row:
    """What was measured: medians over the repetitions, of the slowest rank; ideal_ms from the simulator.

    units: measured in units of one chunk's forward. spread: (longest - shortest) / median. resolved: the schedule that
    `auto` took. cpu_ms: processor time of a rank in a step, the mean over ranks: of the engine alone, whatever else
    runs on the machine. Live activations are those of a rank's stages; torch's engine does not count them.
    """

    engine: str
    schedule: str
    ranks: int
    microbatches: int
    cost_ms: float
    all_to_all: float
    overlap: str
    clock: str
    group: str
    resolved: str
    ideal_ms: float
    measured_ms: float
    ratio: float
    units: float
    spread: float
    cpu_ms: float
    peak_live_activations: int | None
    allowed_live_activations: int | None
    repetitions: int


@dataclass(frozen=True)
class Lanes:
    """`parallel.pipeline.p2p.Lanes` of a single pipeline."""

    down: dist.ProcessGroup
    up: dist.ProcessGroup


def make_lanes() -> Lanes:
    """Of all ranks. No more groups than are used: each of gloo's has a thread that wakes a hundred times a second."""
    down, up = dist.group.WORLD, dist.new_group()
    assert down is not None and isinstance(up, dist.ProcessGroup)
    return Lanes(down, up)


@dataclass(frozen=True)
class _Prepared:
    """A case ready to run on this rank; peak: live activations measured and allowed here."""

    case: Case
    resolved: str
    ideal: float
    step: Callable[[], object]
    peak: Callable[[], tuple[int, int] | None]


@dataclass(frozen=True)
class _Taken:
    """One repetition: of the slowest rank, and the ranks' mean."""

    seconds: float
    cpu_seconds: float


def _prepare(case: Case, rank: int, lanes: Lanes) -> _Prepared:
    schedule = schedule_of(case)
    costs = costs_of(case, schedule.num_stages)
    device = SleptDevice(blocking=case.clock == "blocking", serial=case.overlap == "off", sends=case.clock == "nccl")
    if case.engine == "torch":
        engine = TorchEngine(case.schedule, num_microbatches=case.microbatches, costs=costs, device=device)
        return _Prepared(case, case.schedule, ideal(case), engine.step, lambda: None)
    mesh = Mesh(ParallelConfig(case.ranks, schedule=schedule.name), rank)
    stages = SleptStages(costs, num_stages=schedule.num_stages, device=device)
    groups = SleptLanes(lanes, device) if device.sends else lanes
    executor = Executor(
        schedule, mesh, groups, stages, dtype=torch.float32, device=torch.device("cpu"), overlap=case.overlap
    )

    def step() -> None:
        losses = executor.step(lambda number: Microbatch(torch.full((1, 2), number)))
        device.synchronize()
        assert all(float(loss.main) for number, loss in losses.items() if number), "a loss is missing"

    return _Prepared(case, schedule.name, ideal(case), step, lambda: (executor.peak_live, executor.peak_allowed))


def _once(one: _Prepared) -> _Taken:
    dist.barrier()
    cpu, start = _cpu_seconds(), time.perf_counter()
    one.step()
    seconds = torch.tensor([time.perf_counter() - start])
    used = torch.tensor([_cpu_seconds() - cpu])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(used)
    return _Taken(seconds.item(), used.item() / dist.get_world_size())


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _measure(prepared: Sequence[_Prepared], repetitions: int) -> list[Row]:
    """All cases in turns; every rank gets all rows."""
    taken: list[list[_Taken]] = [[] for _ in prepared]
    gc.collect()
    gc.freeze()  # what was imported is never looked through again
    for repetition in range(repetitions + 1):
        for one, found in zip(prepared, taken, strict=True):
            once = _once(one)
            if repetition:  # the first warms up
                found.append(once)
    return [_row(one, found) for one, found in zip(prepared, taken, strict=True)]


def _row(prepared: _Prepared, taken: Sequence[_Taken]) -> Row:
    peak = torch.tensor(prepared.peak() or (0, 0))
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    times = [once.seconds for once in taken]
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
        cpu_ms=1000 * statistics.median(once.cpu_seconds for once in taken),
        peak_live_activations=live,
        allowed_live_activations=allowed,
        repetitions=len(times),
    )


def _as_rank(cases: Sequence[Case], arguments: Namespace) -> int:
    """What each process does: measure the cases for as many ranks as there are, group by group."""
    with process_group(TrainConfig(1, 1, device="cpu", threads=1, timeout_seconds=300)) as process:
        sleep_precisely()
        lanes = make_lanes()
        mine = [case for case in cases if case.ranks == process.world_size]
        for _, together in groupby(mine, key=lambda case: case.group):
            prepared = [_prepare(case, process.rank, lanes) for case in together]
            for row in _measure(prepared, arguments.repetitions):
                if process.rank == 0:
                    print(json.dumps(asdict(row)) if arguments.json else _line(row), flush=True)
    return 0


def bench_pipeline(argv: list[str]) -> int:
    """`expertpipe bench pipeline [--json] [--groups ...] [--rows ...]`; starts its own processes."""
    arguments = _parser(with_estimates={"-h", "--help"} & set(argv) != set()).parse_args(argv)
    every = default_cases()
    numbers = arguments.rows or [n for n, case in enumerate(every) if case.group in arguments.groups]
    if not all(0 <= number < len(every) for number in numbers):
        print(f"expertpipe: --rows {max(numbers)}: there are rows 0 to {len(every) - 1}, see --list", file=sys.stderr)
        return USER_ERROR
    cases = [_asked(every[n], arguments) for n in sorted(numbers)]
    if outer_world_size(os.environ) is not None and arguments.as_rank:
        if arguments.model:
            schedule, overlap = arguments.model
            return pipeline_model.measure_as_rank(schedule, overlap, arguments.repetitions, json_lines=arguments.json)
        return _as_rank(cases, arguments)
    if arguments.list:
        print("\n".join(_listed(every, arguments.repetitions)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if cases and not arguments.json:
            print(_HEAD, flush=True)
        for ranks in sorted({case.ranks for case in cases}):
            print(f"{ranks} ranks ...", file=sys.stderr)
            rank_argv = ["bench", "pipeline", *argv, "--as-rank"]
            code = run_local(rank_argv, world_size=ranks, run_dir=Path(folder), threads=1)
            if code:
                return code
        if "model" in arguments.groups and not arguments.rows:
            print("tiny model under every schedule ...", file=sys.stderr)
            return pipeline_model.measure(arguments.repetitions, Path(folder), json_lines=arguments.json)
    return 0


def _asked(case: Case, arguments: Namespace) -> Case:
    """The row with the options' scale and clock; what torch's engine sends, its rank waits for."""
    clock = arguments.clock or case.clock
    if case.engine == "torch" and clock == "nccl":
        clock = "stream"
    return replace(case, cost_ms=case.cost_ms * arguments.scale, clock=clock)


def _parser(*, with_estimates: bool) -> ArgumentParser:
    parser = ArgumentParser(
        prog="expertpipe bench pipeline",
        description=__doc__.replace("`", "") if __doc__ else None,
        epilog=_estimates() if with_estimates else None,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="a JSON line a row instead of a table")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        metavar="GROUP",
        help=f"which of {', '.join(GROUPS)} (default all)",
    )
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="these rows alone, by the numbers of --list")
    parser.add_argument(
        "--list", action="store_true", help="print the rows, their numbers and about how long they take"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="after one to warm up (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply all costs, e.g. 0.2 for a quick look")
    parser.add_argument(
        "--clock", choices=CLOCKS,
        help="blocking: the rank sleeps through each piece; stream: computation is a queue, as on a GPU; nccl: and "
        "what leaves is sent when computed while the rank issues on (default: stream; rows without a peer nccl)",
    )  # fmt: skip
    parser.add_argument("--as-rank", action="store_true", help="of the processes that this starts")
    parser.add_argument("--model", nargs=2, metavar=("SCHEDULE", "OVERLAP"), help="of those: the row to measure")
    return parser


def _estimates() -> str:
    found = {**estimate(default_cases(), 5), "model": model_estimate()}
    groups = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found.items())
    return f"About how many seconds each group takes with 5 repetitions:\n{groups}"


def _listed(cases: Sequence[Case], repetitions: int) -> list[str]:
    """At most 80 columns."""
    lines = [
        f"{'row':<4}{'group':<13}{'engine':<11}{'schedule':<10}{'P':>3}{'M':>5}{'ms':>5}  {'overlap':<8}{'seconds':>7}"
    ]
    for number, case in enumerate(cases):
        overlap = case.overlap if case.all_to_all else "-"
        lines.append(
            f"{number:<4}{case.group:<13}{case.engine:<11}{case.schedule:<10}{case.ranks:>3}{case.microbatches:>5}"
            f"{case.cost_ms:>5.3g}  {overlap:<8}{(repetitions + 1) * ideal(case):>7.0f}"
        )
    return lines


_HEAD = f"{'engine':<11}{'schedule':<15}{'P':>3}{'M':>5}{'ms':>5} {'overlap':<7}{'ideal':>8}{'measured':>9}"
_HEAD += f"{'ratio':>6}{'units':>7}{'live':>5}"


def _line(row: Row) -> str:
    """At most 82 columns."""
    name = f"auto={row.resolved}" if row.schedule == "auto" else row.schedule
    live = "" if row.peak_live_activations is None else row.peak_live_activations
    overlap = row.overlap if row.all_to_all else "-"
    return (
        f"{row.engine:<11}{name:<15}{row.ranks:>3}{row.microbatches:>5}{row.cost_ms:>5.3g} {overlap:<7}"
        f"{row.ideal_ms:>8.0f}{row.measured_ms:>9.0f}{row.ratio:>6.3f}{row.units:>7.1f}{live:>5}"
    )
