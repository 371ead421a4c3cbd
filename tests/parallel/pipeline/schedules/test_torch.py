"""Our lists against those of torch.distributed.pipelining, action by action."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as theirs

from parallel.pipeline.schedules import build

V_SHAPE = (theirs.ScheduleDualPipeV, theirs.ScheduleZBVZeroBubble)
SINGLE = (theirs.Schedule1F1B, theirs.ScheduleGPipe)
SHAPES = [(1, 3), (2, 4), (3, 6), (4, 8), (4, 21), (8, 16), (8, 20), (16, 32)]


def stage(ranks: int, stages: int, index: int) -> Any:
    """As much of a stage as a schedule looks at before it runs."""
    return SimpleNamespace(
        group_size=ranks, num_stages=stages, stage_index=index, group_rank=0, has_backward=True,
        is_first=index == 0, is_last=index == stages - 1, submod=torch.nn.Identity(), stage_index_to_group_rank=None,
    )  # fmt: skip


def torch_schedule(kind: Any, *, ranks: int, microbatches: int, per_rank: int = 2) -> Any:
    stages = ranks * (1 if kind in SINGLE else per_rank)
    mine = [0, stages - 1] if kind in V_SHAPE else list(range(0, stages, ranks))
    local: Any = [stage(ranks, stages, index) for index in mine]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(local[0] if kind in SINGLE else local, microbatches, loss_fn=lambda output, target: output)


def torch_lists(kind: Any, **shape: int) -> list[list[str]]:
    """Every rank's computations."""
    schedule = torch_schedule(kind, **shape)
    order = schedule.pipeline_order if hasattr(schedule, "pipeline_order") else schedule._get_pipeline_order()
    skipped = (None, theirs.REDUCE_GRAD)
    return [
        [str(action) for action in order[rank] if action is not None and action.computation_type not in skipped]
        for rank in range(shape["ranks"])
    ]


def our_lists(name: str, ranks: int, microbatches: int, per_rank: int | None = None) -> list[list[str]]:
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches, stages_per_rank=per_rank)
    return [[str(step) for step in steps] for steps in schedule.ranks]


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
def test_dualpipev_equals_torch(ranks: int, microbatches: int) -> None:
    """Wherever theirs exists: M >= 2P."""
    expected = torch_lists(theirs.ScheduleDualPipeV, ranks=ranks, microbatches=microbatches)
    assert our_lists("dualpipev", ranks, microbatches) == expected


@pytest.mark.parametrize(("ranks", "microbatches"), [*SHAPES, (4, 1), (4, 3), (8, 9), (8, 14)])
def test_zbv_equals_torch(ranks: int, microbatches: int) -> None:
    """For any number of micro-batches."""
    expected = torch_lists(theirs.ScheduleZBVZeroBubble, ranks=ranks, microbatches=microbatches)
    assert our_lists("zbv", ranks, microbatches) == expected


@pytest.mark.parametrize("per_rank", [2, 3, 4])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (3, 6), (4, 8), (4, 20), (8, 16), (4, 3), (8, 1)])
def test_interleaved_equals_torch(ranks: int, microbatches: int, per_rank: int) -> None:
    """Where P divides M, or M < P; elsewhere theirs takes rounds of more than P micro-batches or refuses."""
    expected = torch_lists(
        theirs.ScheduleInterleaved1F1B, ranks=ranks, microbatches=microbatches, per_rank=per_rank
    )  # fmt: skip
    assert our_lists("interleaved", ranks, microbatches, per_rank) == expected


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 4), (4, 8), (4, 6), (8, 16), (8, 20), (16, 32)])
def test_zb1p_equals_torch_with_one_stage_a_rank(ranks: int, microbatches: int) -> None:
    """For M >= P; theirs was written down, ours comes from running the ranks against each other."""
    expected = torch_lists(
        theirs.ScheduleInterleavedZeroBubble, ranks=ranks, microbatches=microbatches, per_rank=1
    )  # fmt: skip
    assert our_lists("zb1p", ranks, microbatches) == expected


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 4), (4, 9), (8, 24)])
def test_1f1b_equals_torch(ranks: int, microbatches: int) -> None:
    """But for the last rank: torch's export starts that one at micro-batch 1 and ends at one that does not exist."""
    expected = torch_lists(theirs.Schedule1F1B, ranks=ranks, microbatches=microbatches)
    assert f"{ranks - 1}F{microbatches}" in expected[-1]
    assert our_lists("1f1b", ranks, microbatches)[:-1] == expected[:-1]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 9), (8, 5)])
def test_gpipe_equals_torch(ranks: int, microbatches: int) -> None:
    assert our_lists("gpipe", ranks, microbatches) == torch_lists(
        theirs.ScheduleGPipe, ranks=ranks, microbatches=microbatches
    )
