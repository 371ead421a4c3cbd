"""The data cursor: the number of samples consumed, and what it means when sequence length and weights change.

A run is cut into stretches in which neither changes. A phase begins at a number of tokens seen; as samples are whole,
that number must be reached by whole samples of the length before it. From there

    tokens seen before sample i = first_tokens + (i - first_sample) * sequence_length

and sample i is the rank-th window of its source at that length, where rank counts the source's samples of that length
over all stretches so far. So a change of weights leaves each source's own sequence of windows as it is; it only changes
how fast each is used up. Another length cuts the source anew: its windows are counted from 0, in an order of its own.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.blend import MAX_PERIOD, Interleave, quotas
from data.config import DataConfig, DataPhase
from data.sampler import SamplerError

_SHARE_ERROR = 0.01  # of its own size that a share may be off because weights become whole numbers


@dataclass(frozen=True)
class Stretch:
    """Samples [first_sample, next stretch) of one length and one blend. ranks: each source's samples before it."""

    first_sample: int
    first_tokens: int
    sequence_length: int
    interleave: Interleave
    ranks: np.ndarray


@dataclass(frozen=True)
class Places:
    """Where samples [N] are: sequence length (one for all), source [N], rank within the source [N]."""

    sequence_length: int
    source: np.ndarray
    rank: np.ndarray


def phase_problems(config: DataConfig) -> list[str]:
    """What is wrong with the weights and phases of a configuration, one message each."""
    found = _weight_problems("data", config.weights, config.prefixes)
    length, tokens = config.sequence_length, 0
    if length < 1:
        found.append(f"data.sequence_length={length}: must be at least 1")
    for number, phase in enumerate(config.phases):
        where = f"data.phases.{number}"
        if phase.weights and len(phase.weights) != len(config.prefixes):
            found.append(
                f"{where}.weights={list(phase.weights)}: {len(phase.weights)} weights for {len(config.prefixes)} "
                f"sources; give one for each of {', '.join(config.prefixes)}"
            )
        elif phase.weights:
            found += _weight_problems(where, phase.weights, config.prefixes)
        if phase.sequence_length < 0:
            found.append(f"{where}.sequence_length={phase.sequence_length}: must be at least 1, or 0 for as before")
        if phase.from_tokens <= tokens:
            found.append(f"{where}.from_tokens={phase.from_tokens}: must be more than {tokens}, where the last began")
        elif length >= 1 and (phase.from_tokens - tokens) % length:
            below = tokens + (phase.from_tokens - tokens) // length * length
            found.append(
                f"{where}.from_tokens={phase.from_tokens}: not reached by whole samples of {length} tokens: use "
                f"{below if below > tokens else below + length} or {below + length}"
            )
        length, tokens = phase.sequence_length or length, max(tokens, phase.from_tokens)
    return found


def _weight_problems(where: str, weights: Sequence[float], prefixes: Sequence[str]) -> list[str]:
    found = [
        f"{where}: weight {weight} of {prefix}: must be above 0; leave the source out instead"
        for prefix, weight in zip(prefixes, weights, strict=True)
        if not 0 < weight < float("inf")
    ]
    if found:
        return found
    quota, total = quotas(weights), sum(weights)
    return [
        f"{where}: weight {weight} of {prefix} is {weight / total:.3g} of the sum, but would get "
        f"{share / sum(quota):.3g}: samples are dealt in parts of 1/{MAX_PERIOD}; use weights of fewer decimal places"
        for prefix, weight, share in zip(prefixes, weights, quota, strict=True)
        if abs(share / sum(quota) / (weight / total) - 1) > _SHARE_ERROR
    ]


class Cursor:
    """Samples to places, for a checked configuration. Raises SamplerError with every problem of `phase_problems`."""

    def __init__(self, config: DataConfig) -> None:
        found = phase_problems(config)
        if found:
            raise SamplerError("; ".join(found))
        self.stretches: list[Stretch] = []
        weights, length, number = config.weights, config.sequence_length, len(config.prefixes)
        used: dict[int, np.ndarray] = {}
        for phase in (DataPhase(0), *config.phases):
            sample = 0
            if self.stretches:
                last = self.stretches[-1]
                samples = (phase.from_tokens - last.first_tokens) // last.sequence_length
                used[last.sequence_length] = last.ranks + last.interleave.counts(samples)
                sample = last.first_sample + samples
            weights, length = phase.weights or weights, phase.sequence_length or length
            interleave = Interleave(weights, seed=config.seed + len(self.stretches))
            ranks = used.get(length, np.zeros(number, dtype=np.int64))
            self.stretches.append(Stretch(sample, phase.from_tokens, length, interleave, ranks))
        self._firsts = [stretch.first_sample for stretch in self.stretches]

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Every length that occurs, each once."""
        return tuple(dict.fromkeys(stretch.sequence_length for stretch in self.stretches))

    def stretch(self, sample: int) -> Stretch:
        """The stretch that holds a sample."""
        return self.stretches[bisect_right(self._firsts, sample) - 1]

    def tokens_seen(self, sample: int) -> int:
        """Tokens of all samples before this one."""
        stretch = self.stretch(sample)
        return stretch.first_tokens + (sample - stretch.first_sample) * stretch.sequence_length

    def places(self, samples_N: np.ndarray) -> Places:
        """Where samples [N] lie; raises SamplerError if they are not all of one length."""
        sources_N, ranks_N = np.empty(len(samples_N), dtype=np.int64), np.empty(len(samples_N), dtype=np.int64)
        numbers_N = np.searchsorted(self._firsts, samples_N, side="right") - 1
        lengths = set()
        for number in np.unique(numbers_N):
            stretch, at = self.stretches[number], np.flatnonzero(numbers_N == number)
            lengths.add(stretch.sequence_length)
            turns = stretch.interleave.turns(samples_N[at] - stretch.first_sample)
            sources_N[at], ranks_N[at] = turns.source, stretch.ranks[turns.source] + turns.rank
        if len(lengths) > 1:
            boundary = next(first for first in self._firsts if samples_N.min() < first <= samples_N.max())
            raise SamplerError(
                f"samples {samples_N.min()} to {samples_N.max()} are of {sorted(lengths)} tokens: sample {boundary} "
                "begins a phase, which must fall between two steps"
            )
        return Places(lengths.pop() if lengths else self.stretches[0].sequence_length, sources_N, ranks_N)
