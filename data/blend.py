"""Which source sample j of a blend comes from, and which one of that source's samples it is, in closed form.

Weights become whole numbers q_k that sum to a period P. Within a period the sources take turns so that after any n
samples source k has had within one of n * q_k / P (quotas as release times and deadlines, earliest deadline first:
Steiner and Yeomans, "Level schedules for mixed-model, just-in-time processes", 1993). Each period starts at another
place of that circle, by a keyed hash, or a weight of one half would give the same source to the same data rank for
ever. Any window of samples, wherever it begins and ends, therefore holds within 4 of its exact share of each source.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.sampler import mix64

MAX_PERIOD = 1 << 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SALT = 0xA0761D6478BD642F


@dataclass(frozen=True)
class Turns:
    """Samples of one stretch, by source: source [N] and rank [N], the how-manieth sample of that source it is."""

    source: np.ndarray
    rank: np.ndarray


def quotas(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights, at least 1 each, with a sum of at most MAX_PERIOD.

    Exact for weights of few decimal places (0.35 counts as 35/100); otherwise the largest remainder of MAX_PERIOD
    parts, each within 1 / MAX_PERIOD of its share.
    """
    assert weights and all(weight > 0 and math.isfinite(weight) for weight in weights), f"weights {weights}"
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    wanted = [share * MAX_PERIOD for share in shares]
    found = [max(1, int(part)) for part in wanted]
    order = sorted(range(len(wanted)), key=lambda k: (found[k] - wanted[k], k))
    for number in range(abs(MAX_PERIOD - sum(found))):
        if sum(found) < MAX_PERIOD:
            found[order[number % len(order)]] += 1
        else:
            found[found.index(max(found))] -= 1
    return found


def level_order(quota: Sequence[int]) -> np.ndarray:
    """Sources [P] in an order whose every prefix of n holds within one of n * quota[k] / P of each source k."""
    period = sum(quota)
    waiting = [(0, 0, k) for k in range(len(quota))]  # release, number, source
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # deadline, source, number
    order = np.empty(period, dtype=np.int32)
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, number, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(number + 1) * period // quota[k]), k, number))
        deadline, k, number = heapq.heappop(ready)
        assert deadline > position
        order[position] = k
        if number + 1 < quota[k]:
            heapq.heappush(waiting, ((number + 1) * period // quota[k], number + 1, k))
    return order


class Interleave:
    """The turns of sources by weight, as a pure function of the sample number; memory is K * P numbers."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.quota = quotas(weights)
        self.period = sum(self.quota)
        self._seed = mix64(np.array([(seed ^ _SALT) & (1 << 64) - 1], dtype=np.uint64))
        self._order_P = level_order(self.quota)
        # before[k, n]: samples of source k among the first n of the circle
        ones = self._order_P == np.arange(len(self.quota))[:, None]
        self._before_KP = np.concatenate([np.zeros((len(ones), 1), np.int64), np.cumsum(ones, axis=1)], axis=1)

    def _circle(self, numbers_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Period, place within it and where in the circle the period starts, of each sample number >= 0."""
        periods_N, places_N = np.divmod(numbers_N.astype(np.int64), self.period)
        keys_N = mix64(self._seed + (periods_N.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        return periods_N, places_N, (keys_N % np.uint64(self.period)).astype(np.int64)

    def _in_period(self, sources_N: np.ndarray, starts_N: np.ndarray, places_N: np.ndarray) -> np.ndarray:
        """Samples of a source in the first `places` of a period that starts at `starts`."""
        ends_N = starts_N + places_N
        over_N = ends_N >= self.period
        count_N = self._before_KP[sources_N, ends_N - over_N * self.period] - self._before_KP[sources_N, starts_N]
        return count_N + over_N * np.array(self.quota)[sources_N]

    def turns(self, numbers_N: np.ndarray) -> Turns:
        """Source and rank of samples [N] of this stretch, counted from 0."""
        periods_N, places_N, starts_N = self._circle(numbers_N)
        sources_N = self._order_P[(starts_N + places_N) % self.period].astype(np.int64)
        ranks_N = periods_N * np.array(self.quota)[sources_N] + self._in_period(sources_N, starts_N, places_N)
        return Turns(sources_N, ranks_N)

    def counts(self, number: int) -> np.ndarray:
        """How many of the first `number` samples come from each source: int64 [K]."""
        sources_K = np.arange(len(self.quota))
        periods_K, places_K, starts_K = self._circle(np.full(len(sources_K), number))
        return periods_K * np.array(self.quota) + self._in_period(sources_K, starts_K, places_K)
