"""Weights & Biases beside the event log, on rank 0 (train.wandb=offline | online); it never ends a run.

Offline, wandb writes into run_dir/wandb and `wandb sync` sends that later. The API key is wandb's own matter
(WANDB_API_KEY or ~/.netrc): it is no key of the configuration, so it reaches no log and no checkpoint of ours. Whatever
wandb raises, or does not answer in time, costs one line and turns it off for the rest of the run.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from launcher.config import RunConfig, to_dict
from launcher.record.events import RankEvent, StepEvent

START_SECONDS, FINISH_SECONDS = 30, 60
_PLAIN = (
    "tokens", "loss", "mtp_loss", "balance_loss", "lr", "batch", "mtp_lambda", "bias_speed", "grad_norm",
    "tokens_per_second", "step_seconds", "mfu_causal", "mfu_full", "dropped_tokens", "expert_load_max_over_mean",
    "router_bias_range",
)  # fmt: skip
FP8_FIGURES = ("amax", "saturated", "underflow", "relative_error")


def step_metrics(event: StepEvent, blocks: list[int]) -> dict[str, float]:
    """What wandb is told of a step: numbers by name; blocks: of the MoE layers, in order."""
    found: dict[str, Any] = {name: getattr(event, name) for name in _PLAIN}
    for kind in ("grad_norms", "weight_norms"):
        found |= {f"{kind}/{group}": value for group, value in getattr(event, kind).items()}
    found |= {f"expert_load/block{b}": load for b, load in zip(blocks, event.expert_load, strict=False)}
    found |= {f"router_bias_range/block{b}": span for b, span in zip(blocks, event.router_bias_ranges, strict=False)}
    found["dead_experts"] = len(event.dead_experts)
    for _, tensor, *figures in event.fp8:  # the worst of all layers
        for name, value in zip(FP8_FIGURES, figures, strict=True):
            key = f"fp8/{tensor}/{name}"
            found[key] = max(found.get(key, 0.0), float(value))
    return {name: value for name, value in found.items() if value is not None}


def rank_metrics(event: RankEvent) -> dict[str, float]:
    """What wandb is told of rank 0's time: seconds a step by phase."""
    return {f"rank0_seconds/{name}": seconds / event.steps for name, seconds in event.phases.items()}


class Tracker:
    """One run's. say: told when wandb fails, once. Nothing raised here reaches the caller."""

    def __init__(self, config: RunConfig, facts: dict[str, Any], *, say: Callable[[str], None]) -> None:
        self._say, self._run = say, None
        train = config.train
        self._blocks = [block for block in range(config.model.num_blocks) if config.model.is_moe(block)]
        self._pending: dict[str, float] = {}
        self._mode = train.wandb
        if train.wandb != "off":
            self._run = self._guarded(lambda: self._start(config, facts), START_SECONDS, "start")

    def _start(self, config: RunConfig, facts: dict[str, Any]) -> Any:
        import wandb

        folder = Path(config.run_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True,
            x_disable_meta=True, init_timeout=START_SECONDS - 5, program="expertpipe",
        )  # fmt: skip
        return wandb.init(
            mode=cast(Any, self._mode), dir=folder, project=config.train.wandb_project, name=config.name,
            config={"run": to_dict(config), "facts": facts}, settings=settings, reinit="finish_previous",
        )  # fmt: skip

    def step(self, event: StepEvent) -> None:
        """Tell a step; of a step that a rollback repeats too, with its own number again."""
        if self._run is not None:
            run, metrics = self._run, step_metrics(event, self._blocks) | self._pending
            self._pending = {}
            self._guarded(lambda: run.log({"step": event.step, **metrics}), FINISH_SECONDS, "log")

    def rank(self, event: RankEvent) -> None:
        """Rank 0's time goes with the next step."""
        if self._run is not None:
            self._pending = rank_metrics(event)

    def close(self, code: int) -> None:
        """The run is over with this exit code."""
        if self._run is not None:
            run, self._run = self._run, None
            self._guarded(lambda: run.finish(exit_code=code), FINISH_SECONDS, "finish")

    def _guarded(self, call: Callable[[], Any], seconds: float, what: str) -> Any:
        """Its result; None, and wandb off from then on, if it raises or does not answer in time."""
        result: list[Any] = []
        failure: list[BaseException] = []

        def attempt() -> None:
            try:
                result.append(call())
            except BaseException as error:
                failure.append(error)

        if what == "log":
            attempt()  # hands over to wandb's own process; a thread for each step would be waste
        else:
            thread = threading.Thread(target=attempt, daemon=True, name=f"wandb {what}")
            thread.start()
            thread.join(seconds)
        if result:
            return result[0]
        reason = f"{type(failure[0]).__name__}: {failure[0]}" if failure else f"no answer in {seconds:g} s"
        self._run = None
        self._say(f"wandb is off from here on, it could not {what}: {' '.join(reason.split())[:200]}")
        return None
