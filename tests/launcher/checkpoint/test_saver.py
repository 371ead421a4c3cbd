"""An asynchronous save holds the state as it was, whatever the next step does meanwhile; what fails is raised."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.build import build
from launcher.checkpoint.host_copy import HostCopy
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.state import checkpoints_dir
from launcher.config import RunConfig
from launcher.runtime import process_group
from launcher.safety.agreement import AgreedError
from launcher.step import train_step
from tests.launcher.checkpoint.states import prepared
from tests.launcher.checkpoint.test_resume import everything, go
from tests.launcher.live import shards

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("saver")
    prepared(found / "data")
    go(configured(found, "waiting", checkpoint_async=False))
    return found


def configured(folder: Path, run_dir: str, **train: Any) -> RunConfig:
    found = everything(folder, run_dir)
    return replace(found, train=replace(found.train, **{"steps": STEPS, **train}))


def saved(run_config: RunConfig) -> list[dict[str, bytes]]:
    return [shards(checkpoints_dir(run_config) / f"step-{step:08d}") for step in range(1, STEPS + 1)]


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that begins when a step would long have updated."""
    plain = HostCopy._copy

    def copy(self: HostCopy, sources: Sequence[Tensor]) -> None:
        time.sleep(0.5)
        plain(self, sources)

    monkeypatch.setattr(HostCopy, "_copy", copy)


def test_a_slow_copy_holds_the_update_back(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow(monkeypatch)
    run_config = replace(configured(folder, "behind"), run_dir=str(tmp_path / "behind"))
    go(run_config)
    assert saved(run_config) == saved(configured(folder, "waiting"))


def test_without_waiting_the_copy_would_be_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow(monkeypatch)
    monkeypatch.setattr(Saver, "before_update", lambda self: None)
    run_config = replace(configured(folder, "behind"), run_dir=str(tmp_path / "behind"))
    go(run_config)
    ours, theirs = saved(run_config), saved(configured(folder, "waiting"))
    assert ours[0] != theirs[0] and ours[-1] == theirs[-1]  # the last one is waited for, and not copied


def test_what_fails_in_the_copy_is_raised_at_the_next_boundary(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(self: HostCopy, sources: Sequence[Tensor]) -> None:
        self._error = MemoryError("no page left")

    monkeypatch.setattr(HostCopy, "_copy", fail)
    run_config = replace(configured(folder, "behind"), run_dir=str(tmp_path / "behind"))
    try:
        with pytest.raises(AgreedError, match="no page left"):
            go(run_config)
    finally:
        dist.destroy_process_group()  # left as it is by a run that fails: its peers may be waiting
    assert not list(checkpoints_dir(run_config).glob("*step-*"))


def test_a_step_waits_for_the_copy_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No message to other ranks, no new memory: counted."""
    run_config = replace(configured(folder, "behind"), run_dir=str(tmp_path / "behind"))
    messages: list[str] = []
    plain = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **keys: (messages.append("sum"), plain(*args, **keys))[1])
    with process_group(run_config.train) as process:
        run = build(run_config, process)
        saver = Saver(run, asynchronous=True)
        assert saver._copy is not None
        memory = [tensor.data_ptr() for tensor in saver._copy.tensors]
        for _ in range(2):
            train_step(run)
            messages.clear()
            saver.start()
            saver.before_update()
            assert messages == []
            finished = saver.finish()
            assert finished is not None and 0 < finished.stall_seconds < finished.total_seconds
        assert [tensor.data_ptr() for tensor in saver._copy.tensors] == memory


def test_a_state_of_another_shape_is_refused() -> None:
    copy = HostCopy([torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
    copy.begin([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
    assert [tensor.tolist() for tensor in copy.taken()] == [[1.0] * 3, [1.0] * 2]
    with pytest.raises(RuntimeError, match=r"torch.float32 \[4\] instead of torch.float32 \[3\]"):
        copy.begin([torch.ones(4), torch.ones(2, dtype=torch.bfloat16)])
