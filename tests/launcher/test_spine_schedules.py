"""Every schedule, on its placement and for awkward numbers of micro-batches, equals one process with one loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.build import plan_layout
from launcher.config import RunConfig
from parallel.pipeline.csv_format import write
from parallel.pipeline.schedules import SCHEDULES, build
from tests.distributed import run_distributed
from tests.launcher.spine import MODEL, assemble, config, parallel_trace, plain_trace, write_tokens
from tests.launcher.test_spine import compare, relative

BAR = 2e-7  # L2, of every gradient of the first step
DEEP = replace(MODEL, num_hidden_layers=8)  # enough for two stages on each of four ranks
DEEPER = replace(MODEL, num_hidden_layers=16)  # and on each of eight
FAST = ("interleaved", "zbv")


def run(prefix: str, layout: tuple[int, int, int], schedule: str, **options: Any) -> None:
    """(pipeline, expert, data) ranks against one process.

    With one direction and one data rank every sum of the first gradients is in the same order, so they are the same to
    the last bit; but for the embedding where its two uses share a rank, and with it one accumulator.
    """
    pipeline, expert, data = layout
    per_rank = options.pop("stages_per_rank", None)
    run_config: RunConfig = config(
        prefix, pipeline=pipeline, expert=expert, data=data, schedule=schedule, clip_norm=1e9, **options
    )
    run_config = replace(run_config, parallel=replace(run_config.parallel, stages_per_rank=per_rank))
    plain = plain_trace(run_config)
    ranks = run_distributed(pipeline * data, parallel_trace, run_config)
    compare(run_config, ranks, plain)
    if data > 1:
        return
    grads = assemble([rank[0]["grad"] for rank in ranks], plain.grads[0])
    errors = {name: relative(grad, plain.grads[0][name]) for name, grad in grads.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= BAR, f"gradient of {worst} differs by {errors[worst]:.2e}"
    if schedule != "dualpipe":
        shared = {"embed_tokens.weight"} if plan_layout(run_config).holders("embed_tokens.weight") == (0,) else set()
        assert {name for name, grad in grads.items() if not torch.equal(grad, plain.grads[0][name])} <= shared


@pytest.mark.parametrize("schedule", FAST)
def test_a_loop_and_a_v_equal_one_process(schedule: str, tmp_path: Path) -> None:
    run(write_tokens(str(tmp_path / "tokens")), (2, 1, 1), schedule, microbatches=5)


def test_dualpipe_with_an_odd_number_of_micro_batches(tmp_path: Path) -> None:
    run(write_tokens(str(tmp_path / "tokens")), (2, 1, 1), "dualpipe", microbatches=3)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in FAST])
def test_every_schedule_equals_one_process(schedule: str, tmp_path: Path) -> None:
    run(write_tokens(str(tmp_path / "tokens")), (2, 1, 1), schedule)


@pytest.mark.exhaustive
@pytest.mark.parametrize("microbatches", [1, 5])
def test_dualpipe_with_few_micro_batches(microbatches: int, tmp_path: Path) -> None:
    """With 1 nothing enters at the last rank."""
    run(write_tokens(str(tmp_path / "tokens")), (2, 1, 1), "dualpipe", microbatches=microbatches)


@pytest.mark.exhaustive
def test_a_schedule_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(write(build("zbv", num_ranks=2, num_microbatches=3)))
    run(write_tokens(str(tmp_path / "tokens")), (2, 1, 1), str(path), microbatches=3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("overlap", ["off", "pairs", "all"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_with_expert_parallelism(schedule: str, overlap: str, tmp_path: Path) -> None:
    run(write_tokens(str(tmp_path / "tokens")), (2, 2, 2), schedule, microbatches=5, overlap=overlap)


@pytest.mark.exhaustive
@pytest.mark.parametrize("microbatches", [2, 7, 11])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_on_four_ranks(schedule: str, microbatches: int, tmp_path: Path) -> None:
    run(write_tokens(str(tmp_path / "tokens")), (4, 1, 1), schedule, model=DEEP, microbatches=microbatches)


@pytest.mark.exhaustive
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_on_four_ranks_with_expert_parallelism(schedule: str, tmp_path: Path) -> None:
    run(write_tokens(str(tmp_path / "tokens")), (4, 2, 2), schedule, model=DEEP, microbatches=9, overlap="all")


@pytest.mark.exhaustive
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_on_eight_ranks(schedule: str, tmp_path: Path) -> None:
    run(write_tokens(str(tmp_path / "tokens")), (8, 1, 1), schedule, model=DEEPER, microbatches=9)


@pytest.mark.exhaustive
def test_three_stages_a_rank(tmp_path: Path) -> None:
    run(write_tokens(str(tmp_path / "tokens")), (2, 1, 1), "interleaved", stages_per_rank=3, microbatches=5)
