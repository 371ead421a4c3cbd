"""The pipeline benchmark on costs near nothing: every row is there, complete and within its peak. No time is judged."""

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from launcher.bench import pipeline as bench_pipeline
from launcher.bench.pipeline import Case, default_cases, schedule_of
from parallel.pipeline.check import check
from parallel.pipeline.overlap import LEVELS
from parallel.pipeline.schedules import SCHEDULES
from tests.distributed import run_distributed

COST_MS = 0.05
CASES = [
    *[Case("expertpipe", name, 4, 5, COST_MS) for name in (*SCHEDULES, "auto")],
    *[Case("expertpipe", "dualpipe", 4, 9, COST_MS, all_to_all=1.0, overlap=level) for level in LEVELS],
    Case("expertpipe", "zbv", 4, 6, COST_MS, all_to_all=0.5, overlap="all"),
    *[Case("torch", name, 4, 8, COST_MS) for name in ("1f1b", "zbv", "dualpipev")],
]


def one_rank() -> list[Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    prepared = [bench_pipeline._prepare(case, dist.get_rank()) for case in CASES]
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
        assert row.measured_ms >= 0.9 * row.ideal_ms > 0 and row.repetitions == 2
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

    from launcher.bench.pipeline import costs_of
    from model.transformer import Microbatch
    from parallel.pipeline.phases import Phase
    from parallel.pipeline.slept import SleptStages

    stages = SleptStages(costs_of(CASES[0], 4), num_stages=4)
    chunk = stages.new_chunk(3, Microbatch(torch.full((1, 2), 7)), 1)
    chunk.begin(torch.full((1, 1, 4), 9.0))
    with pytest.raises(AssertionError, match="micro-batch 7 came to the last stage as 9"):
        chunk.run(Phase("end", 0))


def test_the_default_rows_are_the_published_comparison() -> None:
    cases = default_cases(bench_pipeline.GROUPS)
    assert {(c.ranks, c.microbatches) for c in cases} == {(8, 20), (16, 32), (16, 64), (16, 120)}
    assert {c.schedule for c in cases if c.engine == "torch"} >= {"dualpipev", "zbv"}
    assert all(c.all_to_all == 1 for c in cases if c.overlap != "off")
