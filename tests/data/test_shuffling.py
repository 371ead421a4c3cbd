"""How random the order is: a stretch of 100,000 samples must be spread over sources and documents as a true random
permutation spreads it, at 99.9%.

For n of W windows drawn without replacement into bins of equal size, sum (count - mean)^2 / mean is distributed as
chi-squared with (bins - 1) degrees of freedom times (W - n) / (W - 1), the variance of a draw without replacement. The
bound holds for all stretches together (union bound), and is itself tested on numpy's permutations and on shuffles that
are not good enough.
"""

import math
from statistics import NormalDist

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig
from data.cursor import Cursor
from data.sampler import Sampler

STRETCH = 100_000
WINDOWS = 1_000_000
DOCUMENTS = 1000  # each of WINDOWS / DOCUMENTS windows
LEVEL = 0.001


def chi_squared_quantile(probability: float, degrees: int) -> float:
    """Wilson and Hilferty's approximation: within 0.1% at 999 degrees of freedom."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NormalDist().inv_cdf(probability) * math.sqrt(spread)) ** 3


def distance(order: np.ndarray, windows: int) -> float:
    """How far the fullest and emptiest stretches are from uniform: the largest statistic over its bound (good: < 1)."""
    bins = order * DOCUMENTS // windows
    begins = range(0, len(order) - STRETCH + 1, STRETCH // 2)
    bound = chi_squared_quantile(1 - LEVEL / len(begins), DOCUMENTS - 1) * (windows - STRETCH) / (windows - 1)
    mean = STRETCH / DOCUMENTS
    counts = [np.bincount(bins[begin : begin + STRETCH], minlength=DOCUMENTS) for begin in begins]
    return max(float(((count - mean) ** 2).sum() / mean) for count in counts) / bound


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("epoch", [0, 3])
def test_documents_of_every_stretch(seed, epoch):
    sampler = Sampler(num_tokens=64 * (WINDOWS + 1) + 32, sequence_length=64, seed=seed)
    assert sampler.windows_per_epoch == WINDOWS
    starts = sampler.starts(np.arange(epoch * WINDOWS, (epoch + 1) * WINDOWS))
    assert distance(starts // 64, WINDOWS) < 1


def test_sources_and_documents_of_a_blend():
    config = DataConfig("a", 64, weight=0.5, blend=(SourceConfig("b", 0.3), SourceConfig("c", 0.2)))
    places = Cursor(config).places(np.arange(1_200_000))
    for begin in range(0, len(places.source) - STRETCH, STRETCH // 2):
        counts = np.bincount(places.source[begin : begin + STRETCH], minlength=3)
        # a random permutation would be off by up to 3.5 standard deviations, about 500; this is off by less than 4
        assert abs(counts - STRETCH * np.array([0.5, 0.3, 0.2])).max() < 4
    for k in range(3):
        sampler = Sampler(64 * (WINDOWS + 1) + 32, 64, seed=0, stream=k)
        starts = sampler.starts(places.rank[places.source == k])
        assert len(starts) >= 2 * STRETCH and distance(starts // 64, WINDOWS) < 1


def test_the_bound_is_that_of_random_permutations():
    """numpy's own permutations stay below it, and not far: the largest of 20 is near."""
    draw = np.random.default_rng(0)
    found = [distance(draw.permutation(WINDOWS), WINDOWS) for _ in range(20)]
    assert 0.9 < max(found) < 1


@pytest.mark.parametrize("name", ["none", "buffer", "blocks"])
def test_poor_shuffles_are_caught(name):
    draw = np.random.default_rng(0)
    order = np.arange(WINDOWS)
    if name == "buffer":  # a shuffle buffer of 200,000
        order = np.concatenate([draw.permutation(part) for part in np.split(order, 5)])
    if name == "blocks":  # runs of 8 neighbours stay together
        order = (draw.permutation(WINDOWS // 8)[:, None] * 8 + np.arange(8)).ravel()
    assert distance(order, WINDOWS) > 1
