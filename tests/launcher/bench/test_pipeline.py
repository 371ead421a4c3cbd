"""The pipeline benchmark on costs near nothing: every row is there, complete and within its peak. No time is judged."""

import json
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from launcher.bench import pipeline as bench_pipeline
from launcher.bench.pipeline_cases import GROUPS, Case, default_cases, estimate, ideal, schedule_of
from parallel.pipeline.check import check
from parallel.pipeline.overlap import LEVELS
from parallel.pipeline.schedules import SCHEDULES
from tests.distributed import run_distributed

COST_MS = 0.05
CASES = [
    *[Case("expertpipe", name, 4, 5, COST_MS) for name in (*SCHEDULES, "auto")],
    *[Case("expertpipe", "dualpipe", 4, 9, COST_MS, all_to_all=1.0, overlap=level) for level in LEVELS],
    Case("expertpipe", "zbv", 4, 6, COST_MS, all_to_all=0.5, overlap="all"),
    Case("expertpipe", "dualpipe", 4, 8, COST_MS, all_to_all=1.0, overlap="all", clock="blocking"),
    Case("expertpipe", "dualpipe", 4, 9, COST_MS, all_to_all=1.0, overlap="all", clock="nccl"),
    Case("expertpipe", "dualpipev", 4, 9, COST_MS, clock="nccl"),
    *[Case("torch", name, 4, 8, COST_MS) for name in ("1f1b", "zbv", "dualpipev")],
    Case("torch", "zbv", 4, 8, COST_MS, clock="blocking"),
]


def one_rank() -> list[Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    lanes = bench_pipeline.make_lanes()
    prepared = [bench_pipeline._prepare(case, dist.get_rank(), lanes) for case in CASES]
    rows = bench_pipeline._measure(prepared, 2)
    dist.destroy_process_group()
    return rows


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    found = run_distributed(4, one_rank)
    assert all(rank == found[0] for rank in found)  # every rank has the slowest one's time
    return found[0]


def test_every_case_has_a_row_with_its_own_figures(rows: Any) -> None:
    assert len(rows) == len(CASES)
    for case, row in zip(CASES, rows, strict=True):
        assert (row.engine, row.schedule, row.microbatches) == (case.engine, case.schedule, case.microbatches)
        assert row.measured_ms >= row.ideal_ms > 0 and row.repetitions == 2 and row.cpu_ms > 0
        assert row.ratio == pytest.approx(row.measured_ms / row.ideal_ms)
        assert row.units == pytest.approx(row.measured_ms / COST_MS)


def test_peaks_are_the_schedules(rows: Any) -> None:
    for case, row in zip(CASES, rows, strict=True):
        if case.engine == "torch":
            assert row.peak_live_activations is None
        else:
            peak = max(check(schedule_of(case)).live_activations)
            assert row.peak_live_activations == row.allowed_live_activations == peak


def test_a_lost_or_swapped_message_would_be_seen() -> None:
    """The last stage knows what its micro-batch must have become."""
    import torch

    from launcher.bench.pipeline_cases import costs_of
    from model.transformer import Microbatch
    from parallel.pipeline.phases import Phase
    from parallel.pipeline.slept import SleptDevice, SleptStages

    stages = SleptStages(costs_of(CASES[0], 4), num_stages=4, device=SleptDevice())
    chunk = stages.new_chunk(3, Microbatch(torch.full((1, 2), 7)), 1)
    chunk.begin(torch.full((1, 1, 4), 9.0))
    with pytest.raises(AssertionError, match="micro-batch 7 came to the last stage as 9"):
        chunk.run(Phase("end", 0))


def test_the_default_rows_are_the_published_comparison() -> None:
    cases = default_cases()
    assert {(c.ranks, c.microbatches) for c in cases} == {(8, 20), (16, 32), (16, 64), (16, 120)}
    assert {c.schedule for c in cases if c.engine == "torch"} >= {"dualpipev", "zbv"}
    assert all(c.all_to_all == 1 for c in cases if c.overlap != "off")
    assert {c.group for c in cases} == set(GROUPS) - {"model"}


def test_ideals_are_those_of_the_study_for_torch_and_no_longer_for_ours() -> None:
    """Published, P 8, M 20, 20 ms: 1F1B 3240 ms, ZBV 2540, DualPipeV 2680, DualPipe 2640."""
    published = {"1f1b": 3.24, "zbv": 2.54, "dualpipev": 2.68, "dualpipe": 2.64}
    for name, seconds in published.items():
        if name != "dualpipe":
            assert ideal(Case("torch", name, 8, 20, 20.0)) == pytest.approx(seconds)
        assert ideal(Case("expertpipe", name, 8, 20, 20.0)) <= seconds + 1e-9


def test_ideals_of_the_all_to_all_rows_are_below_half_hidden() -> None:
    for microbatches, units in ((32, 261), (64, 453), (120, 789)):
        case = next(c for c in default_cases() if c.group == f"alltoall{microbatches}")
        assert ideal(case) * 1000 / case.cost_ms < units


def test_seconds_of_a_group_are_its_steps_and_its_start() -> None:
    cases = [case for case in default_cases() if case.group == "engine8"]
    found = estimate(cases, 5)
    assert found.keys() == {"engine8"}
    assert 6 * sum(map(ideal, cases)) < found["engine8"] < 6 * sum(map(ideal, cases)) + 60


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "bench", "pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_rows_are_listed_with_numbers_in_80_columns() -> None:
    found = run("--list")
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and len(lines) == 1 + len(default_cases())
    assert all(len(line) <= 80 for line in lines)


def test_a_row_that_is_not_there_is_refused() -> None:
    found = run("--rows", "99")
    assert found.returncode == 2 and "--rows 99: there are rows 0 to" in found.stderr


@pytest.mark.slow
def test_one_row_alone_as_a_json_line() -> None:
    found = run("--rows", "0", "--scale", "0.05", "--repetitions", "1", "--json")
    assert found.returncode == 0, found.stderr
    (row,) = map(json.loads, found.stdout.splitlines())
    keys = "engine schedule ranks microbatches cost_ms ideal_ms measured_ms ratio peak_live_activations"
    assert set(keys.split()) <= row.keys()
    assert (row["engine"], row["schedule"], row["ranks"], row["cost_ms"]) == ("expertpipe", "dualpipe", 8, 1.0)
    assert row["peak_live_activations"] == row["allowed_live_activations"] == 9  # P + 1
