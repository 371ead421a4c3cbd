"""Global batch sizes over tokens seen: whole numbers, each from an exact token on. No torch.

A ramp is a list of segments like every other schedule, `constant` or `linear`. A linear one grows in levels: the batch
is the straight line rounded down to a multiple that every layout of the run can split. All arithmetic is on whole
numbers, so that every rank and every restart agrees on the token at which a level begins.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from optim.config import Segment

MAX_LEVELS = 4096


@dataclass(frozen=True)
class Level:
    """Sequences of every step that begins at `from_tokens` tokens or later, until the next level."""

    from_tokens: int
    batch: int


def levels(batch: int | Sequence[Segment], *, multiple: int) -> tuple[Level, ...]:
    """The levels of a batch size, ascending in tokens, for segments without `ramp_problems`.

    A linear segment from a to b over T tokens reaches a + k * multiple after ceil(k * multiple * T / (b - a)) of them,
    and so b at its end.
    """
    if isinstance(batch, int):
        return (Level(0, batch),)
    found: list[Level] = []
    begin = 0
    for segment in batch:
        value = int(segment.value)
        if segment.shape == "linear":
            tokens, start = int(segment.tokens), found[-1].batch
            for batch_size in range(start + multiple, value + 1, multiple):
                share = (batch_size - start) * tokens
                found.append(Level(begin - (-share // (value - start)), batch_size))
        elif not found or found[-1].batch != value:
            found.append(Level(begin, value))
        if segment.tokens < math.inf:
            begin += int(segment.tokens)
    return tuple(found)


def batch_at(steps: Sequence[Level], tokens: int) -> int:
    """Sequences of the step that begins at `tokens`."""
    return steps[bisect_right(steps, tokens, key=lambda level: level.from_tokens) - 1].batch


def ramp_problems(key: str, segments: Sequence[Segment], *, multiple: int) -> list[str]:
    """What keeps segments from being a batch size, one message each; nothing on shapes and lengths of zero or less."""
    if not segments:
        return [f"{key}=[]: use a whole number, or segments that begin with {{shape: constant, value: {multiple}}}"]
    found: list[str] = []
    if segments[0].shape != "constant":
        found.append(f"{key}.0.shape={segments[0].shape}: a ramp begins with a constant batch: use constant")
    before = 0.0
    for number, segment in enumerate(segments):
        where = f"{key}.{number}"
        if segment.shape not in ("constant", "linear"):
            found.append(f"{where}.shape={segment.shape}: a batch size is constant or linear: use one of these")
        if not 0 < segment.value < math.inf or segment.value % multiple:
            low = max(1, int(segment.value // multiple)) if 0 < segment.value < math.inf else 1
            found.append(
                f"{where}.value={segment.value:.15g}: every level is a multiple of {multiple} sequences: use "
                f"{low * multiple} or {(low + 1) * multiple}"
            )
        elif segment.shape == "linear" and number:
            found += _linear_problems(where, segment, before, multiple)
        if segment.tokens < math.inf and segment.tokens % 1:
            found.append(f"{where}.tokens={segment.tokens!r}: use a whole number such as {math.ceil(segment.tokens)}")
        before = segment.value
    return found


def _linear_problems(where: str, segment: Segment, before: float, multiple: int) -> list[str]:
    if segment.value <= before:
        return [
            f"{where}.value={segment.value:.15g}: a linear ramp grows, and the batch before it is {before:.15g}: use "
            f"{int(before) + multiple} or more, or shape: constant"
        ]
    if (segment.value - before) / multiple > MAX_LEVELS:
        return [
            f"{where}.value={segment.value:.15g}: {int((segment.value - before) // multiple)} levels of {multiple} "
            f"sequences; at most {MAX_LEVELS}: use a larger train.batch_multiple"
        ]
    return []
