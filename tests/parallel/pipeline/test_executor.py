"""The executor on four processes: its losses and gradients are those of a plain loop over the same stages' model."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.transformer import Microbatch, StageLoss, Transformer
from model.weight_grad import main_grad
from parallel.config import ParallelConfig
from parallel.mesh import Groups, Mesh
from parallel.pipeline.actions import Action, Pair, Schedule, parts
from parallel.pipeline.check import check
from parallel.pipeline.chunk import ModelStages
from parallel.pipeline.executor import Executor
from parallel.pipeline.schedules import build as build_schedule
from tests.distributed import run_distributed
from tests.model.reference import TINY, build

# pipeline, data, schedule, micro-batches; always four processes
CASES = {
    "1f1b": (4, 1, "1f1b", 5),
    "few": (4, 1, "1f1b", 2),
    "dualpipe": (4, 1, "dualpipe", 8),
    "two_pipelines": (2, 2, "dualpipe", 4),
    "no_pipeline": (1, 4, "1f1b", 3),
}
CONFIG = replace(TINY, aux_loss_alpha=0.01)
SPLITS = {1: (range(4),), 2: (range(3), range(3, 4)), 4: (range(1), range(1, 2), range(2, 3), range(3, 4))}


def batch(data_rank: int, number: int, num_microbatches: int) -> Microbatch:
    """Sequences of another length and number for every micro-batch."""
    generator = torch.Generator().manual_seed(100 * data_rank + number)
    tokens = torch.randint(0, CONFIG.vocab_size, (1 + number % 2, 6 + 3 * number), generator=generator)
    return Microbatch(tokens, share=1 / num_microbatches)


def stage_of(whole: Transformer, layers: range) -> Transformer:
    stage = Transformer(CONFIG, layers=layers)
    stage.load_state_dict({name: whole.state_dict()[name] for name in stage.state_dict()})
    return stage


def one_case(case: str) -> dict[str, Any]:
    pipeline, data, name, microbatches = CASES[case]
    mesh = Mesh(ParallelConfig(pipeline, data, schedule=name), dist.get_rank())
    schedule = build_schedule(name, num_ranks=pipeline, num_microbatches=microbatches)
    groups = Groups(mesh, {schedule.holders(s) for s in range(pipeline)}, timeout=timedelta(seconds=60))
    whole = build(CONFIG)
    stages = {s: stage_of(whole, SPLITS[pipeline][s]) for s in schedule.stages_of(mesh.pipeline_rank)}
    told: list[Action] = []
    executor = Executor(
        schedule,
        mesh,
        groups,
        ModelStages(stages),
        dtype=torch.float32,
        device=torch.device("cpu"),
        on_action=told.append,
    )
    losses = [executor.step(lambda number: batch(mesh.data_rank, number, microbatches)) for _ in range(2)]
    return {
        "losses": [{m: (loss.main, loss.mtp[0], loss.loss) for m, loss in step.items()} for step in losses],
        "grads": {
            s: {name: main_grad(w) for name, w in stage.named_parameters()} for s, stage in stages.items()
        },
        "told": [str(action) for action in told],
        "peak": (executor.peak_live, executor.peak_allowed),
    }  # fmt: skip


def one_rank() -> dict[str, Any]:
    torch.manual_seed(0)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {case: one_case(case) for case in CASES}
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(4, one_rank)


def schedule_of(case: str) -> Schedule:
    pipeline, _, name, microbatches = CASES[case]
    return build_schedule(name, num_ranks=pipeline, num_microbatches=microbatches)


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_a_plain_loop_and_are_on_one_rank_each(ranks: Any, case: str) -> None:
    pipeline, data, _, microbatches = CASES[case]
    model = build(CONFIG)
    for data_rank in range(data):
        column = [ranks[p * data + data_rank][case] for p in range(pipeline)]
        for step in range(2):
            found = [item for rank in column for item in rank["losses"][step].items()]
            assert sorted(m for m, _ in found) == list(range(microbatches))
            for m, (main, mtp, loss) in found:
                expected = model(None, batch(data_rank, m, microbatches))
                assert isinstance(expected, StageLoss)
                assert torch.equal(main, expected.main) and torch.equal(mtp, expected.mtp[0])
                assert torch.equal(loss, expected.loss.detach()) and not loss.requires_grad


def plain_gradients(case: str, data_rank: int) -> dict[str, Tensor]:
    """A loop over the micro-batches; the sum of two equal steps, as the executor leaves it."""
    microbatches, model = CASES[case][3], build(CONFIG)
    for _ in range(2):
        for m in range(microbatches):
            model(None, batch(data_rank, m, microbatches)).loss.backward()  # type: ignore[union-attr]
    return {name: main_grad(weight) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_gradients_summed_over_holders_equal_a_plain_loop(ranks: Any, case: str) -> None:
    """Within 2e-6; bitwise where each weight is on one stage of one rank, which is 1F1B but for the embedding."""
    pipeline, data, name, _ = CASES[case]
    for data_rank in range(data):
        summed: dict[str, Tensor] = {}
        for p in range(pipeline):
            for grads in ranks[p * data + data_rank][case]["grads"].values():
                for weight, grad in grads.items():
                    summed[weight] = summed[weight] + grad if weight in summed else grad
        expected = plain_gradients(case, data_rank)
        assert summed.keys() == expected.keys()
        for weight, grad in expected.items():
            assert (summed[weight] - grad).norm() <= 2e-6 * grad.norm(), weight
            if name == "1f1b" and weight != "embed_tokens.weight":
                assert torch.equal(summed[weight], grad), weight


@pytest.mark.parametrize("case", CASES)
def test_actions_run_in_the_order_of_the_schedule_and_within_its_peak(ranks: Any, case: str) -> None:
    schedule, data = schedule_of(case), CASES[case][1]
    peaks = check(schedule).live_activations
    for rank, result in enumerate(ranks):
        position = rank // data
        once = [str(action) for step in schedule.ranks[position] for action in parts(step)]
        assert result[case]["told"] == 2 * once
        assert result[case]["peak"] == (peaks[position], peaks[position])


def test_dualpipe_runs_pairs_and_split_backwards() -> None:
    """So that the cases above cover them."""
    steps = [step for steps in schedule_of("dualpipe").ranks for step in steps]
    assert any(isinstance(step, Pair) for step in steps)
    assert {step.kind for step in steps if isinstance(step, Action)} == {"F", "B", "I", "W"}
