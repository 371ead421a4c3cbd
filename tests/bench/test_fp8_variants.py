"""Broken FP8 is visibly worse where tiles differ in magnitude, and only there."""

from pathlib import Path

import pytest

from tests.bench.fp8_variants import EXPONENT, Size, compare, draw_png, last

SMALL = Size(steps=24, rows=192, hidden=32, outputs=4)


@pytest.mark.parametrize("exponent", [None, EXPONENT])
def test_blocks_and_promotion_are_for_tiles_of_unlike_magnitude(exponent: int | None) -> None:
    losses = compare(exponent, SMALL)
    bf16, blocks, one_scale, unpromoted = (last(curve) for curve in losses.values())
    assert list(losses) == ["BF16", "FP8, blocks", "FP8, one scale a tensor", "FP8, blocks, no promotion"]
    assert bf16 < 0.7 * losses["BF16"][0], "it must have learnt something for its loss to mean something"
    assert blocks == pytest.approx(bf16, rel=0.05)
    if exponent is None:
        assert one_scale == pytest.approx(bf16, rel=0.05) and unpromoted == pytest.approx(bf16, rel=0.05)
    else:
        assert min(one_scale, unpromoted) > 1.3 * blocks


def test_the_picture(tmp_path: Path) -> None:
    curves = {"BF16": [1.0, 0.5], "FP8, blocks": [1.0, 0.6]}
    draw_png({"even": curves, "uneven": curves}, tmp_path / "variants.png")
    assert (tmp_path / "variants.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
