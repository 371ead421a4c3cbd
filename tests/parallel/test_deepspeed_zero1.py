"""DeepSpeed's own ZeRO stage-1 optimizer in the place of ours: the same training, and the same checkpoints.

The equalities run in an environment with DeepSpeed in it, on four gloo processes (deepspeed_program.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import deepspeed_zero1
from parallel.deepspeed_zero1 import MissingDeepSpeed, require_version
from tests.distributed import run_distributed
from tests.extras import environment_with, run_there
from tests.parallel.deepspeed_program import three_ranks

VERSION = "0.19.8"
# A dense gradient of DualPipe is summed over four ranks, in another order than gloo's reduce-scatter.
BOUND = 2e-6


def test_a_version_that_is_not_there_or_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise deepspeed_zero1.PackageNotFoundError(name)

    monkeypatch.setattr(deepspeed_zero1, "version", absent)
    with pytest.raises(MissingDeepSpeed, match=r"not installed \(0\.19\.8 or newer, below 0\.20 is needed\)"):
        require_version()
    for found in ("0.19.7", "0.20.0"):
        monkeypatch.setattr(deepspeed_zero1, "version", lambda name, found=found: found)
        with pytest.raises(MissingDeepSpeed, match=f"DeepSpeed {found} is installed"):
            require_version()
    monkeypatch.setattr(deepspeed_zero1, "version", lambda name: "0.19.9+local")
    assert require_version() == "0.19.9+local"


def test_our_offload_changes_no_bit() -> None:
    """Masters and moments in a copy of their own, as in host memory beside a GPU."""
    without, offloaded = (
        run_distributed(3, three_ranks, "plain", torch.bfloat16, offload) for offload in (False, True)
    )
    for rank, (before, after) in enumerate(zip(without, offloaded, strict=True)):
        for one, other in zip(before, after, strict=True):
            assert len(one) >= 3 and all(map(torch.equal, one, other))
        first, second, third = (step[3 if rank < 2 else 2] for step in before[:3])  # a weight, after the gradients
        assert not torch.equal(first, second) and torch.equal(second, third)


@pytest.fixture(scope="module")
def deepspeed() -> Path:
    """The interpreter of an environment with DeepSpeed."""
    return environment_with(f"deepspeed=={VERSION}", "ninja")


def found(python: Path, case: str, folder: Path) -> dict[str, Any]:
    return json.loads(run_there(python, "tests.parallel.deepspeed_program", case, str(folder)).splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("1f1b", marks=pytest.mark.exhaustive),
        pytest.param("dualpipe", marks=pytest.mark.slow),
        pytest.param("offload", marks=pytest.mark.exhaustive),
    ],
)
def test_three_steps_are_those_of_our_zero1(deepspeed: Path, tmp_path: Path, case: str) -> None:
    result = found(deepspeed, case, tmp_path)
    assert result.pop("biases_equal")
    assert max(result.values()) <= BOUND, result


@pytest.mark.exhaustive
def test_buckets_of_several_groups_a_step_not_taken_and_offload(deepspeed: Path, tmp_path: Path) -> None:
    """Exact within ours; DeepSpeed sums three ranks in another order, one rounding of gradients of up to 6."""
    result = found(deepspeed, "buckets", tmp_path)
    assert len(result) == 6
    for kind, difference in result.items():
        assert difference <= (0 if kind.startswith("plain") else 1e-6), result


@pytest.mark.slow
def test_a_checkpoint_of_either_is_the_others(deepspeed: Path, tmp_path: Path) -> None:
    """Masters and BF16 moments bit for bit, in another layout."""
    for name, result in found(deepspeed, "checkpoints", tmp_path).items():
        assert result["equal"] and result["moved"], name
        assert result["steps"] == [2, 3] and 0 < result["loss"] < result["loss_before"] + 1, name


@pytest.mark.exhaustive
def test_masters_in_host_memory_under_deepspeeds_cpu_adam(deepspeed: Path, tmp_path: Path) -> None:
    result = found(deepspeed, "cpu_adam", tmp_path)
    assert result["grad"] < 1e-4 and result["weight"] < 1e-5 and result["loss"] < 1e-5, result
