"""Batch sizes over tokens: exact at every boundary, of the report's ramp and of any other."""

import re
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.config import Segment
from optim.ramp import MAX_LEVELS, Level, batch_at, levels, ramp_problems

WARMUP, RAMP = 25_165_824_000, 443_834_176_000
REPORT = (Segment("constant", 3072, WARMUP), Segment("linear", 15360, RAMP))


def test_the_ramp_of_the_report_at_every_boundary_to_the_token() -> None:
    found = levels(REPORT, multiple=512)
    assert [level.batch for level in found] == list(range(3072, 15361, 512))
    assert found[0].from_tokens == 0 and found[-1] == Level(469_000_000_000, 15360)
    for before, level in pairwise(found):
        assert batch_at(found, level.from_tokens - 1) == before.batch
        assert batch_at(found, level.from_tokens) == level.batch
        # the line itself, in exact fractions: below the level a token earlier, at or above it here
        line = [3072 + Fraction(12288 * (level.from_tokens - WARMUP - ago), RAMP) for ago in (1, 0)]
        assert line[0] < level.batch <= line[1]
    assert batch_at(found, WARMUP) == 3072 and batch_at(found, 10**15) == 15360


def test_a_number_is_one_level() -> None:
    assert levels(7, multiple=4) == (Level(0, 7),)


def test_constants_jump_and_equal_ones_make_no_level() -> None:
    segments = (
        Segment("constant", 8, 10),
        Segment("constant", 8, 10),
        Segment("constant", 4, 10),
        Segment("linear", 8, 7),
    )
    assert levels(segments, multiple=4) == (Level(0, 8), Level(20, 4), Level(37, 8))


@given(
    start=st.integers(1, 50), rise=st.integers(1, 50), multiple=st.integers(1, 64), first=st.integers(1, 10**13),
    tokens=st.integers(1, 10**13), at=st.floats(0, 1),
)  # fmt: skip
def test_a_ramp_is_its_line_rounded_down(
    start: int, rise: int, multiple: int, first: int, tokens: int, at: float
) -> None:
    low, high = start * multiple, (start + rise) * multiple
    segments = (Segment("constant", low, float(first)), Segment("linear", high, float(tokens)))
    assert ramp_problems("batch", segments, multiple=multiple) == []
    place = int(at * tokens)
    line = low + Fraction((high - low) * place, tokens)
    assert batch_at(levels(segments, multiple=multiple), first + place) == line // multiple * multiple


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), r"b=\[\]: use a whole number, or segments"),
        ((Segment("linear", 8, 5),), "b.0.shape=linear: a ramp begins with a constant batch"),
        ((Segment("constant", 8, 5), Segment("cosine", 16, 5)), "b.1.shape=cosine: a batch size is constant or linear"),
        ((Segment("constant", 6),), "b.0.value=6: every level is a multiple of 4 sequences: use 4 or 8"),
        ((Segment("constant", float("inf")),), "b.0.value=inf: every level is a multiple of 4"),
        ((Segment("constant", 8, 5), Segment("linear", 8, 5)), "b.1.value=8: a linear ramp grows.*use 12 or more"),
        ((Segment("constant", 4, 5.5), Segment("constant", 8)), "b.0.tokens=5.5: use a whole number such as 6"),
        (
            (Segment("constant", 4, 5), Segment("linear", 4 * MAX_LEVELS + 8, 5)),
            f"b.1.value=16392: {MAX_LEVELS + 1} levels of 4 sequences; at most {MAX_LEVELS}",
        ),
    ],
)
def test_what_is_no_ramp_says_why(segments: tuple[Segment, ...], message: str) -> None:

    (found,) = ramp_problems("b", segments, multiple=4)
    assert re.match(message, found), found
