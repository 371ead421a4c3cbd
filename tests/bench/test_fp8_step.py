"""The ratio is of CPU time, FP8 over BF16, turn by turn; the whole command on a small model."""

import json
import subprocess
import sys

import pytest

from tests.bench.fp8_step import cost


def test_the_ratio_is_of_time_not_of_speed() -> None:
    found = cost([1000.0, 1200.0, 900.0], [500.0, 1000.0, 600.0])
    assert found.turns == (2.0, 1.2, 1.5) and found.median == 1.5 and (found.bf16, found.fp8) == (1000.0, 600.0)


@pytest.mark.slow
def test_the_command() -> None:
    small = [
        "model.num_hidden_layers=2",
        "model.hidden_size=64",
        "train.global_batch_size=1",
        "train.micro_batch_size=1",
    ]
    command = [sys.executable, "-m", "tests.bench.fp8_step", "--turns", "1", "--repetitions", "1", "train.threads=1"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=300, check=False)
    row = json.loads(done.stdout)
    assert done.returncode == int(row["median"] > 1.6) and row["turns"] == [row["median"]]
    assert row["median"] == pytest.approx(row["bf16"] / row["fp8"])
