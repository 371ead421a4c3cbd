"""The fast products against the exact ones."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.fp8 import reference
from model.fp8.formats import Layout, Scales, Tile
from model.fp8.gemm import ExactProducts, FastProducts
from model.fp8.quantise import Quantiser
from tests.model.fp8.data import KERNELS, relative_error, wild

FORMS = (
    reference.exact_product,
    reference.hopper_product,
    reference.hopper_accumulate,
    reference.unpromoted_product,
)
CASES = [((300,), 192, 64), ((5,), 130, 257), ((70, 0, 131), 96, 200), ((512,), 384, 512)]


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize(("counts", "out", "inner"), CASES)
def test_fast_form_is_the_exact_one_rounded_to_bf16(
    scales: Scales, counts: tuple[int, ...], out: int, inner: int
) -> None:
    num_rows, groups = sum(counts), len(counts)
    x, grad = wild((num_rows, inner), seed=0, octaves=0), wild((num_rows, out), seed=1, octaves=0)
    weight = wild((groups, out, inner), seed=2, octaves=0)
    rows, columns, blocks = (Quantiser(tile, scales, kernels=KERNELS["native"]) for tile in Tile)
    left, right = (Layout.PLAIN,) * 2 if scales is Scales.FP32 else (Layout.TURNED, Layout.PADDED)
    turned, padded = (replace(columns, layout=layout) for layout in (left, right))
    found: list[list[torch.Tensor]] = []
    forms: list[Any] = [ExactProducts(), FastProducts()]
    for products in forms:
        kept, x_rows = products.cached(rows, x, counts)
        w = products.rounded(blocks, weight, (out,) * groups)
        acc = torch.ones(groups, out, inner)
        products.add_wgrad(acc, products.rounded(turned, grad, counts), products.requantised(padded, kept))
        found.append([products.fprop(x_rows, w), products.dgrad(products.rounded(rows, grad, counts), w), acc - 1])
    for exact, fast in zip(*found, strict=True):
        assert exact.shape == fast.shape
        assert relative_error(fast, exact) < 3e-3  # BF16's rounding: 2^-9 at most, 1.7e-3 on average
        if scales is Scales.POWER_OF_TWO and fast.dtype == torch.bfloat16:
            # Nothing but the last rounding, and the order of an FP32 sum before it.
            one_ulp = exact.abs() * 2**-8 + 1e-5 * exact.abs().max()
            assert ((fast.float() - exact).abs() <= one_ulp).all()
            assert (fast == exact.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("scales", Scales)
def test_what_was_kept_serves_both_orientations(scales: Scales) -> None:
    x = wild((200, 150), seed=3, octaves=1)
    rows, columns = (Quantiser(tile, scales, kernels=KERNELS["native"]) for tile in (Tile.ROW, Tile.COLUMN))
    kept, operand = FastProducts().cached(rows, x, (200,))
    assert torch.equal(FastProducts().requantised(rows, kept).values, operand.values)
    again = FastProducts().requantised(columns, kept)
    assert torch.equal(again.values, columns.as_operand(ExactProducts().requantised(columns, kept)).values)


@pytest.mark.parametrize("scales", Scales)
def test_operands_hold_exactly_what_was_quantised(scales: Scales) -> None:
    for tile, kernels in itertools.product(Tile, KERNELS.values()):
        tensor, operand = Quantiser(tile, scales, kernels=kernels).both(wild((130, 140), seed=4, octaves=5))
        wanted = tensor.dequantise(torch.float32) if operand.scales is None else tensor.values.float()
        assert torch.equal(operand.values.float(), wanted)


def test_sums_are_made_where_the_operands_are() -> None:
    """With another default device, as tensors on a GPU see it."""
    counts, column = (70, 58), Quantiser(Tile.COLUMN, Scales.FP32)
    grad, x = (wild((128, size), seed=size, octaves=0) for size in (24, 40))
    operands = [column.operand(tensor, counts) for tensor in (grad, x)]
    factors = [reference.along_rows(column.quantise(tensor)) for tensor in (grad, x)]

    def results() -> list[torch.Tensor]:
        acc = operands[0].values.new_zeros(2, 24, 40, dtype=torch.float32)
        FastProducts().add_wgrad(acc, operands[0], operands[1])
        return [acc, *(form(*factors) for form in FORMS)]

    wanted = results()
    with torch.device("meta"):
        found = results()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
