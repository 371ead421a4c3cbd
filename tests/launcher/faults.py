"""Faults that tests/launcher/live.py injects into the ranks of a run: each takes its argument and the configuration."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from launcher.config import RunConfig


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _die(config: RunConfig) -> None:
    """SIGKILL to this process; when is in run_dir/killed."""
    Path(config.run_dir, "killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def _before_step(number: int, rank: int, act) -> None:  # type: ignore[no-untyped-def]
    """Call `act` on one rank just before its executor begins a step."""
    from parallel.pipeline.executor import Executor

    plain, calls = Executor.step, [0]

    def step(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls[0] += 1
        if calls[0] == number and _rank() == rank:
            act()
        return plain(self, *args, **kwargs)

    Executor.step = step


def kill(argument: str, config: RunConfig) -> None:
    """kill:RANK,SECONDS after the first step has begun: SIGKILL."""
    rank, seconds = argument.split(",")

    def act() -> None:
        threading.Timer(float(seconds), _die, [config]).start()

    _before_step(1, int(rank), act)


def kill_before(argument: str, config: RunConfig) -> None:
    """kill_before:RANK,STEP: SIGKILL at the beginning of a step of this start, while the last save is under way."""
    rank, step = map(int, argument.split(","))
    _before_step(step, rank, lambda: _die(config))


def kill_at(argument: str, config: RunConfig) -> None:
    """kill_at:RANK,WHERE,COUNT: SIGKILL at the COUNT-th time that WHERE is reached.

    WHERE: `write` (a part of a shard has been written), `fsync`, `commit`, `rename`, `latest`, `verify`, `delete`.
    """
    from launcher.checkpoint import files as checkpoint_files
    from launcher.checkpoint import saver as checkpoint_saver
    from launcher.checkpoint import tensor_file

    rank, where, count = argument.split(",")
    if _rank() != int(rank):
        return
    left = [int(count)]

    def wrap(module: object, name: str, only: str = "") -> None:
        """only: how the name of the first argument, a path, begins."""
        plain = getattr(module, name)

        def fatal(*args, **kwargs):  # type: ignore[no-untyped-def]
            left[0] -= not only or Path(args[0]).name.startswith(only)
            if left[0] == 0:
                _die(config)
            return plain(*args, **kwargs)

        setattr(module, name, fatal)

    places = {
        "write": (tensor_file.TensorFile, "_write"),
        "fsync": (os, "fsync"),
        "commit": (checkpoint_saver, "commit"),
        "rename": (Path, "rename"),
        "latest": (checkpoint_files, "point_latest"),
        "verify": (checkpoint_saver, "require_whole"),
        "delete": (checkpoint_saver.shutil, "rmtree", "step-"),  # not what prepares a folder to write to
    }
    wrap(*places[where])


def stop(argument: str, config: RunConfig) -> None:
    """stop:RANK,STEP: SIGSTOP at the beginning of a step of this start."""
    rank, step = map(int, argument.split(","))
    _before_step(step, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def stuck(argument: str, config: RunConfig) -> None:
    """stuck:RANK,STEP: the main thread stands still, all others live."""
    rank, step = map(int, argument.split(","))
    _before_step(step, rank, lambda: time.sleep(3600))


def nan_gradient(argument: str, config: RunConfig) -> None:
    """nan_gradient:RANK,STEP,PARAMETER: one element of a gradient, before gradients are summed."""
    from parallel.zero1 import Zero1

    rank, step, name = argument.split(",")
    plain, calls = Zero1.reduce_gradients, [0]

    def reduce_gradients(self) -> None:  # type: ignore[no-untyped-def]
        calls[0] += 1
        if calls[0] == int(step) and _rank() == int(rank):
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    if parameter.name == name:
                        parameter.weight.main_grad.view(-1)[1] = torch.nan
        plain(self)

    Zero1.reduce_gradients = reduce_gradients


def spike(argument: str, config: RunConfig) -> None:
    """spike:SAMPLE: the step whose data begin with this sample gives every rank's gradients a factor of 1000."""
    from launcher import step as module

    plain = module.global_norm
    runs: list = []
    plain_step = module.microbatch

    def microbatch(run, number):  # type: ignore[no-untyped-def]
        runs[:] = [run]
        return plain_step(run, number)

    def global_norm(shards, total, device):  # type: ignore[no-untyped-def]
        found = list(shards)
        if runs and runs[0].progress.samples == int(argument):
            for shard in found:
                shard.mul_(1000)
        return plain(found, total, device)

    module.microbatch, module.global_norm = microbatch, global_norm


def _change_loss(number: int, change) -> None:  # type: ignore[no-untyped-def]
    """Of every micro-batch of one step of this start, on the ranks that have computed it; gradients stay."""
    from parallel.pipeline.executor import Executor

    plain, calls = Executor.step, [0]

    def step(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls[0] += 1
        losses = plain(self, *args, **kwargs)
        if calls[0] != number:
            return losses
        return {key: replace(loss, main=change(loss.main)) for key, loss in losses.items()}

    Executor.step = step


def bad_loss(argument: str, config: RunConfig) -> None:
    """bad_loss:STEP,VALUE: the losses of a step are `nan` or `inf`."""
    step, value = argument.split(",")
    _change_loss(int(step), lambda loss: torch.full_like(loss, float(value)))


def loss_spike(argument: str, config: RunConfig) -> None:
    """loss_spike:STEP: five nats more."""
    _change_loss(int(argument), lambda loss: loss + 5)


def other_seed(argument: str, config: RunConfig) -> RunConfig | None:
    """other_seed:RANK."""
    if _rank() != int(argument):
        return None
    return replace(config, train=replace(config.train, seed=config.train.seed + 1))


def no_space(argument: str, config: RunConfig) -> None:
    """no_space:RANK,STEP: the shard of one step cannot be written."""
    import errno

    from launcher.checkpoint import state as checkpoint

    rank, step = map(int, argument.split(","))
    plain = checkpoint.write_tensors

    def write_tensors(path, tensors, *, step=None):  # type: ignore[no-untyped-def]
        if _rank() == rank and step == wanted:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path, tensors, step=step)

    wanted = step
    checkpoint.write_tensors = write_tensors
