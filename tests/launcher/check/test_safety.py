"""Combinations of keys that would not mean what they say."""

from dataclasses import replace

from data.config import DataPhase
from launcher.check.safety import check_safety
from launcher.config import RunConfig, compose


def run(policy: str, *, every: int = 100, phases: tuple[DataPhase, ...] = ()) -> RunConfig:
    config = compose(["experiment=tiny"])
    train = replace(config.train, spike_policy=policy, checkpoint_every=every)
    return replace(config, train=train, data=replace(config.data, phases=phases))


def test_rolling_back_needs_checkpoints_and_one_phase() -> None:
    assert check_safety(run("rollback")) == []
    (message,) = check_safety(run("rollback", phases=(DataPhase(1000),)))
    assert "data.phases" in message and "use skip or warn" in message
    (message,) = check_safety(run("rollback", every=0))
    assert "use train.checkpoint_every=100" in message
    assert check_safety(run("skip", every=0, phases=(DataPhase(1000),))) == []
