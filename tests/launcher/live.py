"""A real run of a few ranks as the launcher would start it, on a small model, with faults that a test injects.

The ranks are processes of their own. A fault is a function of tests/launcher/faults.py, named on their command line,
which is called before training begins and may replace what it likes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config import RunConfig, to_dict
from tests.launcher.spine import MODEL, config

ROOT = Path(__file__).parents[2]
SMALL = replace(MODEL, vocab_size=320, num_hidden_layers=2, hidden_size=32, n_routed_experts=4, n_group=2, topk_group=1)

RANK = """
import json, sys
import torch
torch.set_num_threads(1)
from launcher.__main__ import is_user_error
from launcher.config import from_dict
from launcher.train import train
from tests.launcher import faults
with open(sys.argv[1]) as file:
    config = from_dict(json.load(file))
for fault in sys.argv[2:]:
    name, _, argument = fault.partition(":")
    config = getattr(faults, name)(argument, config) or config
try:
    sys.exit(train(config))
except Exception as error:
    if not is_user_error(error):
        raise
    print(f"expertpipe: {error}", file=sys.stderr)
    sys.exit(2)
"""
LAUNCHER = """
import sys
from pathlib import Path
from launcher.local import run_local
world, run_dir, *command = sys.argv[1:]
sys.exit(run_local([], world_size=int(world), run_dir=Path(run_dir), threads=1, command=command, stop_seconds=60))
"""


def live_config(folder: Path, prefix: str, *, steps: int, pipeline: int = 2, data: int = 1, **train: Any) -> RunConfig:
    """A run of pipeline x data ranks with a checkpoint after each step; more keys of `train` by name."""
    found = config(
        prefix, pipeline=pipeline, expert=1, data=data, schedule="1f1b", microbatches=2, model=SMALL,
        run_dir=str(folder),
    )  # fmt: skip
    chosen: dict[str, Any] = {"steps": steps, "checkpoint_every": 1, "timeout_seconds": 60} | train
    return replace(found, train=replace(found.train, **chosen))


@dataclass(frozen=True)
class Ended:
    """How a run ended. seconds: of wall time; at: when, as the clock says."""

    code: int
    output: str
    seconds: float
    at: float


class Live:
    """One start of a run; `wait` for its end, or do something to it before."""

    def __init__(self, config: RunConfig, *faults: str, env: dict[str, str] | None = None) -> None:
        self.run_dir = Path(config.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir.parent / f"{self.run_dir.name}.json"
        path.write_text(json.dumps(to_dict(config)))
        command = [sys.executable, "-c", RANK, str(path), *faults]
        world = str(config.parallel.world_size)
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, world, str(self.run_dir), *command],
            cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self, seconds: float = 120) -> Ended:
        """Wait for the end; a run that does not end fails the test and is killed."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, _ = self.process.communicate()
            raise AssertionError(f"the run did not end in {seconds} s:\n{output[-3000:]}") from None
        return Ended(self.process.returncode, output, time.monotonic() - self.began, time.time())

    def until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        """Wait until something has happened; fails when the run ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"it never happened:\n{self.process.communicate()[0][-3000:]}")
            time.sleep(0.02)


def run(config: RunConfig, *faults: str, seconds: float = 120, env: dict[str, str] | None = None) -> Ended:
    """Start and wait."""
    return Live(config, *faults, env=env).wait(seconds)


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of every step in the run's event log."""
    lines = (run_dir / "events.jsonl").read_text().splitlines()[1:]
    return {event["step"]: event["loss"] for event in map(json.loads, lines)}


def shards(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of all shards of a checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))}
