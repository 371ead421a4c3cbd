"""The central claim: DualPipe or 1F1B x expert parallelism x ZeRO-1 equals one process with one model and one loop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config import RunConfig
from tests.distributed import run_distributed
from tests.launcher.spine import STEPS, Trace, assemble, config, parallel_trace, plain_trace, write_tokens

# (pipeline, expert, data), schedule, layers per stage
CASES = [
    ((2, 1, 1), "1f1b", (2, 4)),
    ((2, 1, 1), "dualpipe", (4, 2)),
    ((2, 2, 2), "1f1b", None),
    ((2, 2, 2), "dualpipe", (2, 4)),
    ((4, 2, 2), "1f1b", (1, 2, 2, 1)),
    ((4, 2, 2), "dualpipe", (2, 1, 2, 1)),
]
LARGE = [((4, 4, 4), "1f1b", (1, 2, 2, 1)), ((4, 4, 4), "dualpipe", (2, 2, 1, 1))]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def compare(run_config: RunConfig, ranks: list[list[dict[str, Any]]], plain: Trace, *, exact: bool = False) -> None:
    """Every gradient, weight, bias, count, loss and norm of every step; no parameter may be absent."""
    grad_bar = 0.0 if exact else 2e-6
    for step in range(STEPS):
        grads = assemble([rank[step]["grad"] for rank in ranks], plain.grads[step])
        assert grads.keys() == plain.grads[step].keys() and len(grads) > 60
        errors = {name: relative(grads[name], plain.grads[step][name]) for name in grads}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= grad_bar, f"step {step}: gradient of {worst} differs by {errors[worst]:.2e}"
        weights = assemble([rank[step]["weight"] for rank in ranks], plain.weights[step])
        for name, weight in weights.items():
            assert relative(weight, plain.weights[step][name]) <= 1e-5, f"step {step}: weight {name}"
        seen = set()
        for rank in ranks:
            for block, bias in rank[step]["bias"].items():
                assert torch.equal(bias, plain.biases[step][block]), f"step {step}: bias of block {block}"
                assert torch.equal(rank[step]["counts"][block], plain.counts[step][block])
                seen.add(block)
            result, expected = rank[step]["result"], plain.results[step]
            assert abs(result.loss / expected.loss - 1) <= 2e-6
            assert abs(result.mtp_loss / expected.mtp_loss - 1) <= 2e-6
            assert abs(result.grad_norm / expected.grad_norm - 1) <= 2e-6
            assert result.lr == expected.lr
        assert seen == plain.biases[step].keys()


def run_case(
    folder: Path, layout: tuple[int, int, int], schedule: str, layers: Any, mutate: Any = None, **options: Any
) -> None:
    pipeline, expert, data = layout
    prefix = write_tokens(str(folder / "tokens"))
    exact = schedule == "1f1b" and data == 1
    run_config = config(
        prefix, pipeline=pipeline, expert=expert, data=data, schedule=schedule, layers=layers,
        clip_norm=1e9 if exact else 0.5,  # the norm is summed in another order: exact only while it does not clip
        **options,
    )  # fmt: skip
    plain = plain_trace(run_config)
    ranks = run_distributed(pipeline * data, parallel_trace, run_config, mutate)
    compare(run_config, ranks, plain, exact=exact)


@pytest.mark.parametrize(("layout", "schedule", "layers"), CASES)
def test_parallel_equals_one_process(tmp_path: Path, layout: Any, schedule: str, layers: Any) -> None:
    run_case(tmp_path, layout, schedule, layers)


@pytest.mark.parametrize("overlap", ["off", "pairs", "all"])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_overlap_and_recomputation_change_nothing(tmp_path: Path, schedule: str, overlap: str) -> None:
    recompute = {"off": "none", "pairs": "attend", "all": "layer"}[overlap]
    run_case(tmp_path, (2, 2, 2), schedule, (2, 4), overlap=overlap, recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "schedule", "layers"), LARGE)
def test_sixteen_processes_equal_one(tmp_path: Path, layout: Any, schedule: str, layers: Any) -> None:
    run_case(tmp_path, layout, schedule, layers, overlap="all")


def drop_mirror_sum(run: Any) -> None:
    """Gradients of this pipeline rank alone: the mirror's copy of the stage is forgotten."""
    for bucket in run.zero1.buckets:
        if run.mesh.pipeline_rank >= run.mesh.config.pipeline // 2:
            bucket.grads = torch.zeros_like(bucket.grads)  # what is reduced is no longer what is accumulated


def mtp_scaled_wrong(run: Any) -> None:
    """The MTP loss weighed once for every pipeline direction."""
    from launcher import step as module

    plain = module.value_at
    module.value_at = lambda segments, tokens: plain(segments, tokens) * (2 if segments[0].value == 0.3 else 1)


def norm_counted_twice(run: Any) -> None:
    """Both copies of a mirrored stage enter the norm of the clip."""
    from launcher import step as module

    plain = module.global_norm
    module.global_norm = lambda shards, total, device: plain([*list(shards)] * 2, total, device)


@pytest.mark.parametrize(
    ("mutation", "message"),
    [(drop_mirror_sum, "gradient of"), (mtp_scaled_wrong, "gradient of"), (norm_counted_twice, "weight|grad_norm")],
)
def test_planted_faults_are_caught(tmp_path: Path, mutation: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_case(tmp_path, (2, 1, 1), "dualpipe", (2, 4), mutation)


def test_a_skipped_parameter_is_caught() -> None:
    like = {"a": torch.zeros(4), "b": torch.zeros(2)}
    with pytest.raises(AssertionError, match="b: elements held"):
        assemble([{("a", 0): torch.ones(4)}], like)
