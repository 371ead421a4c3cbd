"""Every part of the state is needed: a resume that leaves one out is told from a straight run, which it else equals."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher.build import Run, build
from launcher.checkpoint.reader import Reader
from launcher.checkpoint.state import checkpoints_dir
from launcher.config import RunConfig
from launcher.runtime import process_group
from launcher.safety.guard import Safety
from launcher.step import train_step
from optim.config import Segment
from tests.launcher.checkpoint.outcome import Outcome, differences, outcome
from tests.launcher.checkpoint.states import prepared
from tests.launcher.live import SMALL
from tests.launcher.spine import config

BEFORE, STEPS = 3, 5
Change = Callable[[Run, Safety], None]


def everything(folder: Path, run_dir: str) -> RunConfig:
    """One rank with all the state there is: EMA, a batch that grows after the restart, a spike guard, BF16 moments."""
    prefix = str(folder / "data" / "train")
    found = config(prefix, pipeline=1, expert=1, data=1, schedule="1f1b", model=SMALL, run_dir=str(folder / run_dir))
    ramp = (Segment("constant", 2, 3 * 2 * 32), Segment("linear", 4, 64))
    train = replace(
        found.train, steps=STEPS, global_batch_size=ramp, batch_multiple=1, checkpoint_every=1, keep_checkpoints=9,
        spike_policy="skip", spike_window=3,
    )  # fmt: skip
    speed = (Segment("constant", 0.02),)
    optim = replace(found.optim, ema_decay=0.5, moments="bf16", bias_update_speed=speed)
    return replace(found, train=train, optim=optim)


def go(run_config: RunConfig, change: Change = lambda run, safety: None, *, seed: int = 0) -> Outcome:
    """Train as `launcher.train` does, in this process; `change` is done after the start. seed: of all generators."""
    losses: dict[int, float] = {}
    with process_group(run_config.train) as process:
        run = build(run_config, process)
        torch.manual_seed(seed)
        np.random.seed(seed)
        with Safety(run, say=lambda text: None, on_action=lambda action: None) as safety:
            safety.resume()
            change(run, safety)
            code: int | None = None
            while code is None:
                result = train_step(run, safety.judge)
                losses[run.progress.step] = result.loss
                code = safety.after_step()
    return outcome(checkpoints_dir(run_config) / f"step-{run_config.train.steps:08d}", losses)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder with data, a straight run, and one that ended after `BEFORE` steps."""
    folder = tmp_path_factory.mktemp("resume")
    prepared(folder / "data")
    short = everything(folder, "short")
    go(replace(short, train=replace(short.train, steps=BEFORE)))
    return folder, go(everything(folder, "straight"))


def resumed(folder: Path, tmp_path: Path, change: Change = lambda run, safety: None) -> Outcome:
    """From the short run on, with other random numbers."""
    shutil.copytree(folder / "short" / "checkpoints", tmp_path / "checkpoints")
    run_config = replace(everything(folder, "short"), run_dir=str(tmp_path))
    return go(run_config, change, seed=7)


def other(kind: str) -> Callable[[pytest.MonkeyPatch], Change]:
    """What is read of one kind stays as it was built."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> Change:
        plain = Reader.read

        def read(self: Reader, found: str, name: str, out: Tensor, *, offset: int = 0) -> None:
            if found != kind:
                plain(self, found, name, out, offset=offset)

        monkeypatch.setattr(Reader, "read", read)
        return lambda run, safety: None

    return patch


def after(change: Change) -> Callable[[pytest.MonkeyPatch], Change]:
    return lambda monkeypatch: change


def forget(what: str, value: Any = 0) -> Change:
    def change(run: Run, safety: Safety) -> None:
        setattr(run.progress, what, value)

    return change


def no_spikes(run: Run, safety: Safety) -> None:
    safety.spikes.load(None)


def no_updates(run: Run, safety: Safety) -> None:
    run.optimizer.steps = 0


LEFT_OUT = {
    "masters": other("master"),
    "first moments": other("exp_avg"),
    "second moments": other("exp_avg_sq"),
    "average of the weights": other("ema"),
    "router biases": other("router_bias"),
    "sample cursor": after(forget("samples")),
    "tokens (schedules, batch ramp)": after(forget("tokens")),
    "AdamW's count of updates": after(no_updates),
    "history of the spike guard": after(no_spikes),
}


def test_a_resume_equals_a_straight_run_whatever_the_generators_hold(
    straight: tuple[Path, Outcome], tmp_path: Path
) -> None:
    """No random number is drawn in a step, so no generator's state belongs to the state of a run."""
    folder, expected = straight
    found = resumed(folder, tmp_path)
    assert sorted(found.losses) == [BEFORE + 1, STEPS] and differences(found, expected) == []
    assert expected.facts["tokens"] == 4 * 2 * 32 + 4 * 32  # the batch grew after the restart
    assert len(expected.facts["spikes"]["losses"]) == 3


@pytest.mark.parametrize("what", LEFT_OUT)
def test_whatever_is_left_out_is_seen(
    straight: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder, expected = straight
    assert differences(resumed(folder, tmp_path, LEFT_OUT[what](monkeypatch)), expected)
