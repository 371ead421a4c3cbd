"""What keeps a run safe, in one place that the loop asks once a step: lock, saves, signals, spikes, end of the data.

Everything that could differ between ranks (a signal that reached one of them, a write that failed on one, a copy that
one has not finished) is agreed in one small all-reduce at the end of each step; so no rank ever acts alone, and none
waits for a decision that another has not heard of.
"""

import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from data.sampler import Sampler
from launcher.build import Run
from launcher.checkpoint.reader import read_manifest
from launcher.checkpoint.saver import Saved, Saver
from launcher.checkpoint.state import agreed, checkpoints_dir, discard_temporary, load, newest_valid
from launcher.record.collapse import CollapseWatch
from launcher.safety.agreement import highest
from launcher.safety.run_lock import RunLock, RunLockError
from launcher.safety.spikes import SpikeGuard

REQUEUE = 75  # exit code: start me again, I go on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MAX_ROLLBACKS = 3  # to the same checkpoint


class StopSignals:
    """Remembers SIGTERM and SIGUSR1 instead of dying of them; `received` is the latest. Main thread only."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class RollbackError(RuntimeError):
    """Spikes come back after every rollback, or there is nothing to roll back to."""


def exhausted(run: Run) -> bool:
    """Whether the coming step would need a sample of an epoch beyond train.max_epochs."""
    limit = run.config.train.max_epochs
    if not limit:
        return False
    first, count = run.progress.samples, run.plan.at(run.progress.tokens).batch
    places = run.loader.cursor.places(np.arange(first, first + count))  # type: ignore[attr-defined]
    for source in np.unique(places.source):
        stream = run.loader.streams[source]  # type: ignore[attr-defined]
        sampler = Sampler(stream.num_tokens, places.sequence_length, run.config.data.seed, int(source))
        if places.rank[places.source == source].max() >= limit * sampler.windows_per_epoch:
            return True
    return False


class Safety:
    """One run's; every method is called by all ranks together. A context manager around all of its steps.

    say: told on rank 0 what is worth a line. on_action: told on every rank what it is about to do.
    """

    def __init__(self, run: Run, *, say: Callable[[str], None], on_action: Callable[[str], None]) -> None:
        self._run, self._say, self._on_action = run, say, on_action
        self._root = checkpoints_dir(run.config)
        self._lock = RunLock(Path(run.config.run_dir)) if run.process.rank == 0 else None
        self.spikes = SpikeGuard(run.config.train)
        self.collapse = CollapseWatch(
            steps=run.config.train.collapse_steps,
            load=run.config.train.collapse_load,
            num_experts=run.config.model.n_routed_experts,
            top_k=run.config.model.num_experts_per_tok,
        )
        self._signals = StopSignals()
        self._saver = Saver(
            run,
            # a run that saves at its end alone waits for it: no memory for a copy
            asynchronous=run.config.train.checkpoint_async and bool(run.config.train.checkpoint_every),
            lock=self._lock,
            extra=lambda: {"spikes": self.spikes.state(), "collapse": self.collapse.state()},
            say=self._note,
            on_phase=lambda phase: on_action(f"checkpoint: {phase}"),
        )
        self._rollbacks: dict[str, int] = {}

    def __enter__(self) -> "Safety":
        self._on_action("taking the lock of the run")
        lock = self._lock
        agreed(self._run, lock.acquire if lock is not None else lambda: None)
        self._signals.__enter__()
        if lock is not None:
            discard_temporary(self._run.config)
        return self

    def __exit__(self, *exc: object) -> None:
        self._signals.__exit__()
        if self._lock is not None:
            self._lock.release()

    def _note(self, text: str, **facts: Any) -> None:
        """Keep it and say it: run_dir/faults.jsonl has everything out of the ordinary."""
        if self._run.process.rank == 0:
            record = {"time": time.time(), "step": self._run.progress.step, "what": text, **facts}
            with open(Path(self._run.config.run_dir) / "faults.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self._say(text)

    def resume(self) -> bool:
        """Continue from the newest checkpoint that verifies; whether there was one."""
        self._on_action("looking for a checkpoint that verifies")
        found = newest_valid(self._run, self._note)
        if found is None:
            return False
        self._on_action(f"loading {found.name}")
        agreed(self._run, lambda: self._load(found))
        return True

    def _load(self, path: Path) -> None:
        load(self._run, path, say=self._note, verified=True)
        manifest = read_manifest(path)
        self.spikes.load(manifest.get("spikes"))
        self.collapse.load(manifest.get("collapse"))

    def judge(self, loss: float, norm: float) -> bool:
        """For `train_step`: whether the step may update; what a save still copies is waited for first."""
        self._saver.before_update()
        return self.spikes.judge(loss, norm)

    def watch_experts(self, loads: Mapping[int, float], dead: Mapping[int, tuple[int, ...]]) -> list[str]:
        """After a step, before `after_step`: say and keep what `CollapseWatch` finds; the lines."""
        found = self.collapse.step(loads, dead)
        for finding in found:
            text = f"step {self._run.progress.step}: {finding.text}"
            self._note(text, kind=finding.kind, block=finding.block, experts=list(finding.experts))
        return [finding.text for finding in found]

    def after_step(self) -> int | None:
        """What is due after a step; the exit code if the run ends here, None if it goes on.

        AgreedError when a save failed on any rank or another job has the folder, RollbackError when going back does
        not help.
        """
        run = self._run
        if self.spikes.spike is not None and self._on_spike(self.spikes.spike):
            return None
        lost = self._lock is not None and self._lock.lost
        mine = (self._signals.received, int(self._saver.busy), int(lost))
        stop, busy, taken_over = highest(run.groups.world, run.process.device, *mine)
        if taken_over:
            agreed(run, self._give_way)
        self._tell(self._saver.advance(any_busy=bool(busy)))
        every, last = run.config.train.checkpoint_every, run.progress.step >= run.config.train.steps
        end = exhausted(run)
        ends = bool(stop) or last or end
        if ends or (every and run.progress.step % every == 0):
            self.finish_save()
            self._on_action("checkpoint: copy")
            self._tell(self._saver.start(wait=ends))
        if stop:
            self._note(f"stopped after step {run.progress.step} by {signal.Signals(stop).name}; start again to go on")
            return REQUEUE
        if end and not last:
            self._note(f"the data is used up after step {run.progress.step} (train.max_epochs)")
        return 0 if last or end else None

    def _give_way(self) -> None:
        """RunLockError where the lock was lost; kept too, as the job that would show it may be gone (a dead slurmd)."""
        try:
            if self._lock is not None:
                self._lock.require()
        except RunLockError as error:
            self._note(str(error))
            raise

    def finish_save(self) -> None:
        """Wait for the save that is under way, if there is one: what a run ends with is kept."""
        self._tell(self._saver.finish())

    def _tell(self, saved: Saved | None) -> None:
        if saved is not None:
            self._say(
                f"saved {saved.path.name} in {saved.total_seconds:.1f} s, the step waited {saved.stall_seconds:.2f} s"
            )

    def _on_spike(self, spike: str) -> bool:
        """Told always; with the policy `rollback` back to the newest checkpoint, the data since then left out.

        Whether the run is at another step now.
        """
        run, policy = self._run, self._run.config.train.spike_policy
        step = run.progress.step
        done = {"warn": "updated all the same", "skip": "batch skipped", "rollback": "rolled back"}[policy]
        self._note(f"spike in step {step}: {spike}; {done} (train.spike_policy={policy})", policy=policy)
        if policy != "rollback":
            return False
        self.finish_save()
        samples = run.progress.samples
        found = newest_valid(run, self._note)
        if found is None:
            raise RollbackError(f"spike in step {step}: {spike}; there is no checkpoint yet to roll back to")
        self._rollbacks[found.name] = self._rollbacks.get(found.name, 0) + 1
        if self._rollbacks[found.name] > MAX_ROLLBACKS:
            raise RollbackError(
                f"spike in step {step}: {spike}; {MAX_ROLLBACKS} rollbacks to {found.name} have not helped"
            )
        agreed(run, lambda: self._load(found))
        skipped = samples - run.progress.samples
        run.progress.samples = samples
        self._note(f"went back to {found.name}; {skipped} samples are left out", checkpoint=found.name)
        return True
