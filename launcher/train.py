"""Training: the loop, and what happens around a step. Runs in every rank."""

import time
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

import torch
from rich.console import Console

from launcher import measured
from launcher.build import Run, build, plan_layout
from launcher.checkpoint import checkpoints_dir, latest, load, save
from launcher.config import RunConfig, to_yaml
from launcher.continuation import begin_with
from launcher.display import Display
from launcher.events import EventLog, StepEvent
from launcher.recorder import Recorder, recorder_path
from launcher.runtime import is_lost_peer, process_group
from launcher.step import NonFiniteError, StepResult, train_step
from parallel.expert.native.failure import NativeError
from parallel.expert.roll_call import ExpertError
from parallel.pipeline.p2p import PipelineError


def train(config: RunConfig) -> int:
    """Train as configured, from the newest checkpoint of the run if there is one; the exit code."""
    with process_group(config.train) as process:
        recorder = Recorder(recorder_path(config.run_dir, process.rank))
        step = 0
        recorder.note(step, "building")
        run = build(config, process, on_action=lambda action: recorder.note(step, action.describe()))
        found = latest(checkpoints_dir(config))
        if found is not None:
            recorder.note(step, f"loading {found.name}")
            load(run, found)
        elif config.train.init_from:
            recorder.note(step, f"beginning with {config.train.init_from}")
            begin_with(run, Path(config.train.init_from))
        with _Log(run) as log:
            while run.progress.step < config.train.steps:
                step, started = run.progress.step + 1, time.perf_counter()
                try:
                    result = train_step(run)
                except (NonFiniteError, PipelineError, ExpertError, NativeError) as error:
                    return log.failed(str(error))
                except RuntimeError as error:
                    if not is_lost_peer(error):
                        raise
                    return log.failed(f"rank {process.rank} lost a peer in step {step}: {str(error).splitlines()[0]}")
                log.step(result, time.perf_counter() - started)
                _record_actions(run)
                if _is_due(config, run.progress.step):
                    recorder.note(step, "saving a checkpoint")
                    log.saved(save(run).name)
        recorder.note(step, "finished")
    return 0


def _is_due(config: RunConfig, step: int) -> bool:
    every = config.train.checkpoint_every
    return step == config.train.steps or (every > 0 and step % every == 0)


def _record_actions(run: Run) -> None:
    """Append the step's pipeline actions of the first pipeline, in time, where they are due."""
    config, step = run.config, run.progress.step
    every, mesh = config.train.record_actions_every, run.mesh
    if not every or step % every or mesh.data_rank:
        return
    with open(checkpoints_dir(config).parent / f"actions_rank{mesh.pipeline_rank}.jsonl", "a") as file:
        for work in run.executor.measured:
            start, end = (1e6 * (run.executor.began + seconds) for seconds in (work.start, work.end))
            rank = mesh.pipeline_rank
            file.write(measured.line(rank=rank, step=step, actions=work.actions, start_us=start, end_us=end) + "\n")


def describe(config: RunConfig) -> list[str]:
    """The run in a few lines of at most 80 columns."""
    from model.counts import counts

    c, p = counts(config.model), config.parallel
    layout = plan_layout(config)
    sizes = "+".join(str(len(layers)) for layers in layout.stages)
    return [
        f"{config.name}: {c.main / 1e6:.1f}M weights, {c.active / 1e6:.1f}M active a token, MTP {c.mtp / 1e6:.1f}M",
        f"{p.world_size} ranks: pipeline {p.pipeline} ({p.schedule}, layers {sizes}) x data {p.data}, "
        f"expert {p.expert} inside data, ZeRO-1",
        f"{_range(level.batch for level in config.batch_levels)} sequences of {config.data.sequence_length} tokens a "
        f"step, {_range(config.microbatch_counts)} micro-batches a pipeline, {config.train.precision}",
    ]


def _range(numbers: Iterable[int]) -> str:
    low, high = min(found := list(numbers)), max(found)
    return f"{low:d}" if low == high else f"{low:d} to {high:d}"


class _Log:
    """What rank 0 tells: screen, event file; silent on other ranks."""

    def __init__(self, run: Run) -> None:
        self._run, self._speaks = run, run.process.rank == 0
        self._display = Display()

    def __enter__(self) -> "_Log":
        if self._speaks:
            config, done = self._run.config, self._run.progress.step
            header = describe(config)
            if done:
                header.append(f"resumed after step {done}, {self._run.progress.tokens:,} tokens")
            checkpoints_dir(config).mkdir(parents=True, exist_ok=True)
            folder = checkpoints_dir(config).parent
            (folder / "config.yaml").write_text(to_yaml(config))
            facts = {"name": config.name, "torch": torch.__version__, "schedule": config.parallel.schedule}
            self._events = EventLog(folder / "events.jsonl", facts=facts, resume_step=done)
            self._display.start(config.train.steps, done + 1, header)
        return self

    def step(self, result: StepResult, seconds: float) -> None:
        if not self._speaks:
            return
        progress = self._run.progress
        loads = tuple(result.expert_load.values())
        event = StepEvent(
            step=progress.step,
            tokens=progress.tokens,
            loss=result.loss,
            mtp_loss=result.mtp_loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens_per_second=result.tokens / seconds,
            step_seconds=seconds,
            expert_load_max_over_mean=max(loads, default=1.0),
            expert_load=loads,
            router_bias_range=result.bias_range,
            expert_counts=tuple(map(tuple, (result.expert_counts or {}).values())),
            fp8=tuple(map(astuple, result.fp8 or ())),
        )
        self._events.append(event)
        self._display.step(event)

    def saved(self, name: str) -> None:
        if self._speaks:
            self._display.note(f"saved {name}")

    def failed(self, reason: str) -> int:
        Console(stderr=True, soft_wrap=True).print(reason, markup=False)
        return 1

    def __exit__(self, *exc: object) -> None:
        if self._speaks:
            self._display.close()
            self._events.close()
