"""Spikes by the medians of the last steps: told apart from noise, and the same after a restart."""

import json
from dataclasses import replace

import pytest

from launcher.run_config import TrainConfig
from launcher.safety.spikes import WARM_UP_STEPS, SpikeGuard

TRAIN = TrainConfig(steps=1, global_batch_size=1, spike_loss=0.5, spike_grad_norm=10.0, spike_window=16)


def quiet(train: TrainConfig = TRAIN, steps: int = 20) -> SpikeGuard:
    guard = SpikeGuard(train)
    assert all(guard.judge(3.0 - 0.01 * step + 0.1 * (step % 2), 1.0 + 0.2 * (step % 3)) for step in range(steps))
    return guard


@pytest.mark.parametrize("policy", ["warn", "skip", "rollback"])
def test_a_spike_is_found_and_the_policy_followed(policy: str) -> None:
    guard = quiet(replace(TRAIN, spike_policy=policy))
    before = guard.state()
    assert guard.judge(3.6, 1.0) == (policy == "warn")
    assert guard.spike is not None and "loss 3.6, median 2.9" in guard.spike and "train.spike_loss=0.5" in guard.spike
    assert guard.judge(2.9, 13.0) == (policy == "warn")
    assert guard.spike is not None and "gradient norm 13" in guard.spike
    assert guard.state() == before  # a spike does not shift the median that finds the next one
    assert guard.judge(2.9, 11.0) and guard.spike is None  # ten times 1.2 is 12


def test_nothing_is_judged_before_there_is_a_median() -> None:
    guard = SpikeGuard(replace(TRAIN, spike_policy="skip"))
    assert all(guard.judge(10.0 ** (step % 3), 100.0 * step) for step in range(WARM_UP_STEPS))
    assert not guard.judge(1e4, 1.0)


def test_a_restart_judges_as_the_straight_run() -> None:
    guard, again = quiet(), SpikeGuard(TRAIN)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state() and len(again.state()["losses"]) == 16
    for loss in (3.3, 3.39, 3.41, 3.6):
        assert again.judge(loss, 1.0) == guard.judge(loss, 1.0) and again.spike == guard.spike
    again.load(None)
    assert again.state() == {"losses": [], "norms": []}
