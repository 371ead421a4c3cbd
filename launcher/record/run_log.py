"""What a run tells while it goes: rank 0 the screen, the event log and wandb; every rank its own log of its time."""

import resource
import statistics
from collections import Counter, deque
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from launcher.build import Run
from launcher.checkpoint.state import checkpoints_dir
from launcher.config import to_yaml
from launcher.record.events import EventLog, RankEvent, StepEvent, rank_log_path
from launcher.record.throughput import Peak, mfu, peak_of
from launcher.record.tracker import Tracker
from launcher.show.display import Display
from launcher.step import StepResult


class RunLog:
    """One rank's side of it. A context manager around all steps; every rank makes one, together.

    header: lines to begin with on the screen.
    """

    def __init__(self, run: Run, header: list[str]) -> None:
        self._run, self._speaks, self._header = run, run.process.rank == 0, header
        self._display = Display()
        self._peak: Peak | None = None
        self._events: EventLog | None = None
        self._rank_events: EventLog | None = None
        self._tracker: Tracker | None = None
        self._last_rank_step = 0
        self._recent: deque[StepEvent] = deque(maxlen=1000)
        self._phases: Counter[str] = Counter()

    def __enter__(self) -> "RunLog":
        run, config, done = self._run, self._run.config, self._run.progress.step
        self._last_rank_step = done
        self._peak = peak = peak_of(config, run.process, run.groups.world)
        folder = checkpoints_dir(config).parent
        if config.train.rank_events_every:
            facts = {"rank": run.process.rank, "world_size": run.process.world_size}
            path = rank_log_path(folder, run.process.rank)
            self._rank_events = EventLog(path, facts=facts, resume_step=done, kind=RankEvent)
        if self._speaks:
            checkpoints_dir(config).mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
            facts = self._facts(peak)
            self._events = EventLog(folder / "events.jsonl", facts=facts, resume_step=done)
            resumed = [f"resumed after step {done}, {run.progress.tokens:,} tokens"] if done else []
            self._display.start(config.train.steps, done + 1, [*self._header, *resumed])
            self._tracker = Tracker(config, facts, say=self._display.note)
        run.clock.take()  # what came before the first step is nobody's
        return self

    def _facts(self, peak: Peak) -> dict[str, Any]:
        config = self._run.config
        return {
            "name": config.name, "torch": torch.__version__, "schedule": config.parallel.schedule,
            "world_size": self._run.process.world_size, "device": _device_name(self._run.process.device),
            "peak_flops": peak.flops, "peak_source": peak.source,
        }  # fmt: skip

    def step(self, result: StepResult, seconds: float, warnings: list[str]) -> None:
        """A step is done."""
        if self._events is None:
            return
        assert self._peak is not None
        event = step_event(self._run, result, seconds, self._peak, warnings)
        self._events.append(event)
        self._recent.append(event)
        left = self._run.config.train.steps - event.step
        self._display.step(event, tokens_left=self._run.plan.tokens_of(left, after=event.tokens))
        if self._tracker is not None:
            self._tracker.step(event)

    def end_of_step(self) -> None:
        """All that belongs to a step is done, its checkpoint too: this rank's time, where it is due."""
        run, step = self._run, self._run.progress.step
        every = run.config.train.rank_events_every
        if self._rank_events is None or (step % every and step < run.config.train.steps):
            return
        seconds, phases, rows = run.clock.take()
        event = RankEvent(step, step - self._last_rank_step, seconds, phases, rows, _peak_bytes(run.process.device))
        self._last_rank_step = step
        self._rank_events.append(event)
        self._phases.update(phases)
        if self._tracker is not None:
            self._tracker.rank(event)

    def note(self, text: str) -> None:
        """A line among the steps."""
        if self._speaks:
            self._display.note(text)

    def rewind(self) -> None:
        """Forget the events after the step that the run has gone back to."""
        step = self._run.progress.step
        if self._events is not None:
            self._events.close()
            self._events = EventLog(self._events.path, resume_step=step)
        if self._rank_events is not None:
            self._rank_events.close()
            self._rank_events = EventLog(self._rank_events.path, resume_step=step, kind=RankEvent)
            self._last_rank_step = step
            self._run.clock.take()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._speaks:
            for line in self._summary() if kind is None else ():
                self._display.note(line)
            self._display.close()
        for log in (self._events, self._rank_events):
            if log is not None:
                log.close()
        if self._tracker is not None:
            self._tracker.close(0 if kind is None else 1)

    def _summary(self) -> list[str]:
        """What the columns of the screen do not show, at most 80 columns a line."""
        if not self._recent or self._peak is None:
            return []
        events, phases = self._recent, self._phases
        causal = statistics.median(event.mfu_causal or 0.0 for event in events)
        full = statistics.median(event.mfu_full or 0.0 for event in events)
        dropped = sum(event.dropped_tokens for event in events)
        against = f"of {self._peak.flops / 1e12:.4g} TFLOP/s"
        lines = [f"MFU {causal:.1%} causal, {full:.1%} full, {against}; dropped tokens {dropped}"]
        total = sum(phases.values())
        if total:
            shares = [(name.replace("_", "-"), seconds / total) for name, seconds in phases.most_common(4)]
            lines.append("rank 0: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
        return lines


def step_event(run: Run, result: StepResult, seconds: float, peak: Peak, warnings: list[str]) -> StepEvent:
    """The line of a step that took so many seconds."""
    loads, speed = tuple(result.expert_load.values()), result.tokens / seconds
    share = mfu(run.config, peak, tokens_per_second=speed, sequence_length=result.sequence_length)
    return StepEvent(
        step=run.progress.step,
        tokens=run.progress.tokens,
        loss=result.loss,
        mtp_loss=result.mtp_loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens_per_second=speed,
        step_seconds=seconds,
        expert_load_max_over_mean=max(loads, default=1.0),
        expert_load=loads,
        router_bias_range=max(result.bias_ranges.values(), default=0.0),
        dropped_tokens=result.dropped,
        expert_counts=tuple(map(tuple, (result.expert_counts or {}).values())),
        fp8=tuple(map(astuple, result.fp8 or ())),
        balance_loss=result.balance_loss,
        router_bias_ranges=tuple(result.bias_ranges.values()),
        dead_experts=tuple((block, expert) for block, experts in result.dead.items() for expert in experts),
        mfu_causal=share.causal,
        mfu_full=share.full,
        mtp_lambda=None if result.mtp_loss is None else result.mtp_lambda,
        bias_speed=result.bias_speed,
        batch=result.batch,
        grad_norms=result.norms.get("grad", {}),
        weight_norms=result.norms.get("weight", {}),
        warnings=tuple(warnings),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return f"CPU ({names[0].partition(':')[2].strip()})" if names else "CPU"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
