"""Values that change over a run, indexed by tokens seen: learning rate, MTP weight, bias update speed. No torch."""

import math
from collections.abc import Sequence

from optim.config import Segment


def value_at(segments: Sequence[Segment], tokens: float, *, initial: float = 0.0) -> float:
    """Value after `tokens` tokens.

    Each segment starts from the last value of the one before (the first from `initial`) and reaches its own after its
    length; `constant` holds its value from its first token on. After the last segment its value stays.
    """
    start = initial
    for segment in segments:
        if tokens < segment.tokens:
            return _within(segment, start, tokens / segment.tokens)
        tokens -= segment.tokens
        start = segment.value
    return start


def _within(segment: Segment, start: float, fraction: float) -> float:
    if segment.shape == "constant":
        return segment.value
    if segment.shape == "linear":
        return start + (segment.value - start) * fraction
    if segment.shape == "cosine":
        return segment.value + (start - segment.value) * (1 + math.cos(math.pi * fraction)) / 2
    raise ValueError(f"segment shape {segment.shape!r} does not exist: use constant, linear or cosine")
