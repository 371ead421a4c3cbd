"""Training: the loop, and what happens around a step. Runs in every rank."""

import faulthandler
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from launcher.build import Run, build, plan_layout
from launcher.checkpoint.state import checkpoints_dir
from launcher.config import RunConfig
from launcher.continuation import begin_with
from launcher.record import measured
from launcher.record.recorder import Recorder, recorder_path
from launcher.record.run_log import RunLog
from launcher.runtime import Process, is_lost_peer, process_group
from launcher.safety.agreement import AgreedError
from launcher.safety.guard import RollbackError, Safety
from launcher.safety.same_run import require_same
from launcher.safety.watchdog import Watchdog
from launcher.step import NonFiniteError, train_step
from model.fp8.config import FP8Config
from parallel.expert.native.failure import NativeError
from parallel.expert.roll_call import ExpertError
from parallel.pipeline.p2p import PipelineError

EMULATED = {"oracle_fast": "emulated by BF16 products", "oracle_exact": "emulated to the bit"}
STOPPING = (NonFiniteError, PipelineError, ExpertError, NativeError, AgreedError, RollbackError)


def train(config: RunConfig) -> int:
    """Train as configured, from the newest checkpoint of the run if there is one that verifies; the exit code.

    0: done. 75: stopped by a signal or by the watchdog, to be started again. 1: the reason is on stderr.
    """
    faulthandler.enable()  # where a library crashed
    with process_group(config.train) as process:
        recorder = Recorder(recorder_path(config.run_dir, process.rank))
        recorder.note(0, "comparing configurations")
        require_same(config, process)
        watchdog = Watchdog(
            config.run_dir,
            recorder,
            rank=process.rank,
            world_size=process.world_size,
            silent_seconds=config.train.silent_rank_seconds,
            stuck_seconds=config.train.stuck_seconds,
        )
        with watchdog:
            try:
                code = _train(config, process, recorder, watchdog)
                recorder.note(config.train.steps, "finished")
                return code
            except RuntimeError as error:
                if is_lost_peer(error) and not isinstance(error, AgreedError):
                    return _failed(_lost_peer(error, process, recorder, watchdog))
                if not isinstance(error, STOPPING):
                    raise
                recorder.note(0, "failed")
                return _failed(str(error))


def _lost_peer(error: RuntimeError, process: Process, recorder: Recorder, watchdog: Watchdog) -> str:
    """Which rank is gone, from what all have last recorded, and what this one was waiting for."""
    where = recorder.step
    recorder.note(where, "lost a peer")
    suspects, said = watchdog.suspects(), str(error).splitlines()[0]
    reason = "; ".join(suspects)
    if suspects and isinstance(error, STOPPING):
        reason += f" ({said.partition(': [')[0]})"  # without the transport's own words
    return f"rank {process.rank} lost a peer in step {where}: {reason or said}"


def _train(config: RunConfig, process: Process, recorder: Recorder, watchdog: Watchdog) -> int:
    step = 0

    def act(what: str) -> None:
        recorder.note(step, what)

    act("building")
    run = build(config, process, on_action=lambda action: act(action.describe()))
    log = RunLog(run, describe(config))
    with Safety(run, say=log.note, on_action=act) as safety:
        if not safety.resume() and config.train.init_from:
            act(f"beginning with {config.train.init_from}")
            begin_with(run, Path(config.train.init_from))
        code: int | None = None if run.progress.step < config.train.steps else 0
        with log:
            while code is None:
                step, started = run.progress.step + 1, time.perf_counter()
                try:
                    with watchdog.step():
                        result = train_step(run, safety.judge)
                except NonFiniteError:  # on all ranks alike
                    safety.finish_save()
                    raise
                seconds = time.perf_counter() - started
                warnings = safety.watch_experts(result.expert_load, result.dead)
                log.step(result, seconds, [*filter(None, [safety.spikes.spike]), *warnings])
                _record_actions(run)
                with run.clock.phase("checkpoint"):
                    code = safety.after_step()
                if run.progress.step < step:
                    log.rewind()
                else:
                    log.end_of_step()
    return code


def _failed(reason: str) -> int:
    Console(stderr=True, soft_wrap=True).print(reason, markup=False)
    return 1


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
    lines = [
        f"{config.name}: {c.main / 1e6:.1f}M weights, {c.active / 1e6:.1f}M active a token, MTP {c.mtp / 1e6:.1f}M",
        f"{p.world_size} ranks: pipeline {p.pipeline} ({p.schedule}, layers {sizes}) x data {p.data}, "
        f"expert {p.expert} inside data, ZeRO-1",
        f"{_range(level.batch for level in config.batch_levels)} sequences of {config.data.sequence_length} tokens a "
        f"step, {_range(config.microbatch_counts)} micro-batches a pipeline",
    ]
    if config.train.precision == "fp8":
        return [*lines, _fp8(config.fp8)]
    return [*lines[:-1], f"{lines[-1]}, {config.train.precision}"]


def _fp8(config: FP8Config) -> str:
    """What computes: an emulation gains no speed anywhere, and is not to pass for a GPU's FP8 unseen."""
    by = ": ".join([config.backend, *filter(None, [EMULATED.get(config.backend)])])
    return f"fp8 ({by})" + (f", experts by {config.grouped}" if config.grouped != "same" else "")


def _range(numbers: Iterable[int]) -> str:
    low, high = min(found := list(numbers)), max(found)
    return f"{low:d}" if low == high else f"{low:d} to {high:d}"
