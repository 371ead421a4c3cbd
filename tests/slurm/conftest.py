"""One Slurm cluster for all tests of this folder, and the run that nothing happened to."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm.test_cluster.cluster import ROOT, Cluster, missing, running
from tests.launcher.live import losses
from tests.slurm.jobs import overrides, prepared

STEPS = 50  # of the run of two ranks, which are stopped in the middle
STEPS_4 = 8


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes; skips aloud where there can be none."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with running(Path(tempfile.mkdtemp(prefix="slurm-"))) as found:  # short: munge's socket has a path of 107 bytes
        yield found


@dataclass(frozen=True)
class Straight:
    """A run on local processes. prefix: of its data."""

    prefix: str
    losses: dict[int, float]


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the data of all runs."""
    return prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def straight(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """All steps in one go, on two processes that `expertpipe train` starts itself."""
    return Straight(prefix, _on_local_processes(prefix, tmp_path_factory.mktemp("straight"), STEPS, 2))


@pytest.fixture(scope="session")
def straight_4(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The same on four."""
    return Straight(prefix, _on_local_processes(prefix, tmp_path_factory.mktemp("straight"), STEPS_4, 4))


def _on_local_processes(prefix: str, run_dir: Path, steps: int, ranks: int) -> dict[int, float]:
    command = [sys.executable, "-m", "launcher", "train", *overrides(prefix, run_dir, steps=steps, ranks=ranks)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return losses(run_dir)
