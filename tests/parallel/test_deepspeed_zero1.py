"""DeepSpeed's own ZeRO stage-1 optimizer in the place of ours: the same training, and the same checkpoints.

The equalities run in an environment with DeepSpeed in it, on four gloo processes (deepspeed_program.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from parallel import deepspeed_zero1
from parallel.deepspeed_zero1 import MissingDeepSpeed, require_version
from tests.extras import environment_with, run_there

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


@pytest.fixture(scope="module")
def deepspeed() -> Path:
    """The interpreter of an environment with DeepSpeed."""
    return environment_with(f"deepspeed=={VERSION}", "ninja")


def found(python: Path, case: str, folder: Path) -> dict[str, Any]:
    return json.loads(run_there(python, "tests.parallel.deepspeed_program", case, str(folder)).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["1f1b", "dualpipe", "offload"])
def test_three_steps_are_those_of_our_zero1(deepspeed: Path, tmp_path: Path, case: str) -> None:
    result = found(deepspeed, case, tmp_path)
    assert result.pop("biases_equal")
    assert max(result.values()) <= BOUND, result


@pytest.mark.slow
def test_a_checkpoint_of_either_is_the_others(deepspeed: Path, tmp_path: Path) -> None:
    """Masters and BF16 moments bit for bit, in another layout, after a step that was not taken."""
    for name, result in found(deepspeed, "checkpoints", tmp_path).items():
        assert result["keys"] > 180 and result["equal"] and result["weights_rounded"], name
        assert result["steps"] == [3] and len(result["losses"]) == 1 and result["losses"][0] > 0, name


@pytest.mark.slow
def test_masters_in_host_memory_under_deepspeeds_cpu_adam(deepspeed: Path, tmp_path: Path) -> None:
    result = found(deepspeed, "cpu_adam", tmp_path)
    assert result["grad"] < 1e-4 and result["weight"] < 1e-5 and result["loss"] < 1e-5, result
