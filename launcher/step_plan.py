"""Which steps a run consists of: batch size, sequence length and micro-batches of each, from tokens seen. No torch.

A step has the batch size and sequence length of the token at which it begins. So the steps of a run follow from its
configuration alone, in closed form over stretches of equal steps, and a restart needs no more than the tokens seen.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from data.config import DataConfig
from launcher.config import RunConfig
from optim.ramp import batch_at


@dataclass(frozen=True)
class PlannedStep:
    """One step. batch: sequences; num_microbatches: of each pipeline, both directions together."""

    batch: int
    sequence_length: int
    num_microbatches: int

    @property
    def tokens(self) -> int:
        """Tokens the main loss is computed on."""
        return self.batch * self.sequence_length


@dataclass(frozen=True)
class Stretch:
    """Equal steps in a row: `num_steps` from step `first_step` (the first of a run is 1), `first_tokens` tokens in."""

    first_step: int
    num_steps: int
    first_tokens: int
    step: PlannedStep

    @property
    def end_tokens(self) -> int:
        """Tokens seen after its last step."""
        return self.first_tokens + self.num_steps * self.step.tokens


class StepPlan:
    """The steps of a run, for a configuration whose batch sizes and phases have been checked."""

    def __init__(self, config: RunConfig) -> None:
        self._samples_per_microbatch = config.train.micro_batch_size * config.parallel.data
        self._levels = config.batch_levels
        self._lengths = _lengths(config.data)

    def at(self, tokens: int) -> PlannedStep:
        """The step that begins when `tokens` tokens have been seen."""
        batch = batch_at(self._levels, tokens)
        length = self._lengths[bisect_right(self._lengths, tokens, key=lambda pair: pair[0]) - 1][1]
        return PlannedStep(batch, length, batch // self._samples_per_microbatch)

    def stretches(self, steps: int, *, after: int = 0) -> Iterator[Stretch]:
        """The first `steps` steps in order, equal ones together; those that follow `after` tokens, counted from 1."""
        changes = sorted({level.from_tokens for level in self._levels} | {begin for begin, _ in self._lengths})
        done, tokens = 0, after
        while done < steps:
            step = self.at(tokens)
            number = bisect_right(changes, tokens)
            left = changes[number] - tokens if number < len(changes) else math.inf
            count = steps - done if left == math.inf else min(steps - done, -(-int(left) // step.tokens))
            yield Stretch(done + 1, count, tokens, step)
            done, tokens = done + count, tokens + count * step.tokens

    def tokens_of(self, steps: int, *, after: int) -> int:
        """Tokens of the `steps` steps that follow when `after` tokens have been seen."""
        return sum(stretch.end_tokens - stretch.first_tokens for stretch in self.stretches(steps, after=after))

    def steps_to(self, tokens: int) -> int:
        """Steps after which at least `tokens` tokens have been seen."""
        for stretch in self.stretches(tokens):  # a step has at least one token
            if stretch.end_tokens >= tokens:
                return stretch.first_step - 1 + -(-(tokens - stretch.first_tokens) // stretch.step.tokens)
        return 0


def length_problems(config: RunConfig) -> list[str]:
    """Phases of another sequence length that do not begin with a step, one message each."""
    plan, lengths, found = StepPlan(config), _lengths(config.data), []
    begins = {begin for begin, _ in lengths[1:]}
    for stretch in plan.stretches(config.train.steps):
        inside = [begin for begin in begins if stretch.first_tokens < begin < stretch.end_tokens]
        for begin in inside:
            before = begin - (begin - stretch.first_tokens) % stretch.step.tokens
            number = next(i for i, phase in enumerate(config.data.phases) if phase.from_tokens == begin)
            near = [tokens for tokens in (before, before + stretch.step.tokens) if tokens]
            found.append(
                f"data.phases.{number}.from_tokens={begin}: falls within a step, whose sequences are of one length: "
                f"use {' or '.join(map(str, near))}"
            )
        if inside:
            break  # where later steps begin depends on this
    return found


def _lengths(data: DataConfig) -> list[tuple[int, int]]:
    """(from tokens, sequence length) of every phase that changes the length."""
    found = [(0, data.sequence_length)]
    for phase in data.phases:
        if phase.sequence_length and phase.sequence_length != found[-1][1]:
            found.append((phase.from_tokens, phase.sequence_length))
    return found
