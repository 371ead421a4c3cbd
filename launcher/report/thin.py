"""Fewer points for a picture, without hiding what was there: each stretch of steps keeps its mean, least and most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 480  # more than a chart has columns for


@dataclass(frozen=True)
class Thinned:
    """x: the middle of each stretch; mean, low, high: of what is finite in it, else nan. size: values each."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    size: int


def thin(x: Sequence[float], y: Sequence[float | None], limit: int = MAX_POINTS) -> Thinned:
    """At most `limit` points of a curve."""
    size = max(1, -(-len(x) // limit))
    found = Thinned([], [], [], [], size)
    for start in range(0, len(x), size):
        places = x[start : start + size]
        values = [v for v in y[start : start + size] if v is not None and math.isfinite(v)]
        found.x.append((places[0] + places[-1]) / 2 if size > 1 else places[0])
        found.mean.append(sum(values) / len(values) if values else math.nan)
        found.low.append(min(values, default=math.nan))
        found.high.append(max(values, default=math.nan))
    return found


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """A centred mean over 2 * reach + 1 values, fewer at the ends; what is not finite stays out."""
    found = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = [v for v in values[index - near : index + near + 1] if math.isfinite(v)]
        found.append(sum(window) / len(window) if window else math.nan)
    return found
