"""A run's recipe as numbers: its phases, and every value that a schedule gives at the tokens where one changes.

A phase is a run; the runs that begin with its weights (`train.init_from`) follow it. No torch.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from launcher.config import RunConfig, choices, compose, experiment_source
from launcher.step_plan import StepPlan
from model.config import ModelConfig
from model.counts import flops_per_token
from optim.config import Segment
from optim.schedule import value_at

HOURS_PER_TRILLION = 180_000  # H800-hours for 1T tokens of the 671B model at a length of 4,096 (report section 1)


@dataclass(frozen=True)
class Values:
    """What holds for a step that begins when `tokens` tokens of its phase have been seen; step: the first such step.

    fim_rate: None for the rate that the data was prepared with.
    """

    tokens: int
    step: int
    lr: float
    batch: int
    sequence_length: int
    mtp_lambda: float
    bias_update_speed: float
    fim_rate: float | None


@dataclass(frozen=True)
class Phase:
    """One run. first_tokens: tokens of the phases before it. tokens: of its own steps."""

    name: str
    config: RunConfig
    first_tokens: int
    tokens: int
    steps: int
    h800_hours: float
    boundaries: tuple[Values, ...]


def phases(config: RunConfig) -> list[Phase]:
    """The run and those experiments that follow it, one after the other; for configurations without problems."""
    found: list[Phase] = []
    following: RunConfig | None = config
    while following is not None and following.name not in [phase.name for phase in found]:
        first = found[-1].first_tokens + found[-1].tokens if found else 0
        found.append(phase_of(following, first_tokens=first))
        following = _successor(following)
    return found


def phase_of(config: RunConfig, *, first_tokens: int = 0) -> Phase:
    """One run alone."""
    *_, last = StepPlan(config).stretches(config.train.steps)
    tokens = last.end_tokens
    boundaries = tuple(values_at(config, at) for at in boundary_tokens(config, tokens))
    return Phase(config.name, config, first_tokens, tokens, config.train.steps, _hours(config), boundaries)


def values_at(config: RunConfig, tokens: int) -> Values:
    """Every scheduled value after so many tokens."""
    optim, plan = config.optim, StepPlan(config)
    planned = plan.at(tokens)
    return Values(
        tokens=tokens,
        step=plan.steps_to(tokens) + 1,
        lr=value_at(optim.lr, tokens),
        batch=planned.batch,
        sequence_length=planned.sequence_length,
        mtp_lambda=value_at(optim.mtp_lambda, tokens),
        bias_update_speed=value_at(optim.bias_update_speed, tokens),
        fim_rate=value_at(optim.fim_rate, tokens) if optim.fim_rate else None,
    )


def boundary_tokens(config: RunConfig, end: int) -> list[int]:
    """0, where a segment of any schedule begins or a phase of the data does, and the end; levels of a ramp left out."""
    batch = config.train.global_batch_size
    schedules: list[Sequence[Segment]] = [
        config.optim.lr, config.optim.mtp_lambda, config.optim.bias_update_speed, config.optim.fim_rate,
        () if isinstance(batch, int) else batch,
    ]  # fmt: skip
    found = {0, end, *(phase.from_tokens for phase in config.data.phases)}
    for segments in schedules:
        found.update(_ends(segments))
    return sorted(tokens for tokens in found if tokens <= end)


def _ends(segments: Sequence[Segment]) -> Iterator[int]:
    tokens = 0
    for segment in segments:
        if segment.tokens == math.inf:
            return
        tokens += math.ceil(segment.tokens)
        yield tokens


def _hours(config: RunConfig) -> float:
    """The report's hours a token, scaled by operations a token: another model, longer attention, by each step's own."""
    tokens: Counter[int] = Counter()
    for stretch in StepPlan(config).stretches(config.train.steps):
        tokens[stretch.step.sequence_length] += stretch.end_tokens - stretch.first_tokens
    flops = sum(flops_per_token(config.model, length, mtp=True).causal * many for length, many in tokens.items())
    return flops / flops_per_token(_report(), 4096, mtp=True).causal / 1e12 * HOURS_PER_TRILLION


@cache
def _report() -> ModelConfig:
    return compose(["model=671b"]).model


def _successor(config: RunConfig) -> RunConfig | None:
    for name in choices("experiment"):
        before = (experiment_source(name).get("train") or {}).get("init_from")
        if before and Path(before).name == config.name:
            return compose([f"experiment={name}"])
    return None
