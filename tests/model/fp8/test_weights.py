"""Weights rounded part by part are those rounded whole, and a layer reads what it is given."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.fp8.formats import AMAX_FLOOR, QuantisedTensor, Scales, Tile
from model.fp8.linear import FP8Layer, FP8Recipe, StaleWeight, weights_changed
from model.fp8.quantise import Quantiser
from model.fp8.watch import tensor_stats, weight_stats
from model.fp8.weights import WeightBlocks, no_numbers
from model.linear import GroupedLinear, Linear
from model.weight_grad import main_grad
from tests.model.fp8.data import KERNELS, same_bits, wild

SHAPES = [(1, 1), (130, 130), (257, 64), (2, 130, 200), (3, 64, 129), (128, 384), (1, 1000)]


def blocks_of(shape: tuple[int, ...], scales: Scales = Scales.POWER_OF_TWO, kernels: str = "native") -> WeightBlocks:
    return WeightBlocks(shape, Quantiser(Tile.BLOCK, scales, AMAX_FLOOR, KERNELS[kernels]))


def in_parts(blocks: WeightBlocks, weight: Tensor, cuts: Sequence[int]) -> QuantisedTensor:
    """As ranks with a stretch each do it."""
    flat = weight.flatten()
    bounds = sorted({0, len(flat), *cuts})
    parts = [(start, flat[start:stop]) for start, stop in pairwise(bounds)]
    scales = blocks.scales(torch.stack([blocks.amax(part, start) for start, part in parts]).amax(0))
    return blocks.whole(torch.cat([blocks.encode(part, start, scales) for start, part in parts]), scales)


@given(st.data())
def test_parts_are_the_whole_to_the_bit(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    weight = wild(shape, seed=data.draw(st.integers(0, 99)), octaves=4, dtype=torch.float32)
    size = weight.numel()
    cuts = data.draw(st.lists(st.integers(0, size), max_size=5))
    bad = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf]))
    if bad is not None:
        weight.view(-1)[data.draw(st.integers(0, size - 1))] = bad
    scales = data.draw(st.sampled_from(list(Scales)))
    for kernels in KERNELS:
        blocks = blocks_of(shape, scales, kernels)
        found, wanted = in_parts(blocks, weight, cuts), blocks.quantise(weight)
        assert same_bits(found.values, wanted.values) and same_bits(found.scales, wanted.scales)
        assert found.rows == wanted.rows and found.shape == wanted.shape == shape


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_part_says_nothing_of_other_blocks(kernels: str) -> None:
    blocks = blocks_of((2, 130, 200), kernels=kernels)
    found = blocks.amax(torch.full((201,), -3.0), 129 * 200)  # the last row of one matrix, one number of the next
    expected = torch.zeros(4, 2)
    expected[1], expected[2, 0] = 3, 3
    assert torch.equal(found, expected)
    assert torch.equal(blocks.amax(torch.tensor([math.nan]), 0)[0], torch.tensor([math.inf, 0]))


def test_blocks_are_of_128_rows_and_columns() -> None:
    with pytest.raises(ValueError, match="128x128"):
        WeightBlocks((2, 2), Quantiser(Tile.ROW))


def test_what_is_no_flat_part_is_refused() -> None:
    with pytest.raises(TypeError, match=r"flat and float32, not torch\.bfloat16"):
        blocks_of((2, 2)).amax(torch.zeros(4, dtype=torch.bfloat16), 0)


@pytest.mark.parametrize("scales", Scales)
def test_figures_of_parts_are_those_of_the_whole(scales: Scales) -> None:
    blocks, weight = blocks_of((2, 130, 200), scales), wild((2, 130, 200), seed=3, octaves=4, dtype=torch.float32)
    weight.view(-1)[::7] *= 1e-6  # some underflow
    rounded, flat = blocks.quantise(weight), weight.flatten()
    sums = [
        blocks.figures(flat[start:stop], start, rounded.values.flatten()[start:stop], rounded.scales)
        for start, stop in ((0, 1), (1, 26_011), (26_011, 52_000))
    ]
    found = weight_stats("layer", torch.stack(sums).sum(0).tolist(), amax=weight.abs().max().item(), numel=52_000)
    expected = tensor_stats("layer", "weight", weight, rounded)
    assert found.underflow > 0 and found.saturated > 0
    for name, value in vars(expected).items():
        assert getattr(found, name) == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


def given_layer(linear: Linear | GroupedLinear, blocks: WeightBlocks, recipe: FP8Recipe) -> QuantisedTensor:
    """Let it compute in FP8 with a rounded weight and no other."""
    tensor = blocks.quantise(linear.weight.data.float())
    layer = FP8Layer(recipe)
    layer.take_weight(tensor)
    linear.fp8 = layer
    linear.weight.data = no_numbers(linear.weight, linear.weight.dtype)
    return tensor


RECIPES = {
    "fast": FP8Recipe(), "exact": FP8Recipe(exact=True), "fp32": FP8Recipe(scales=Scales.FP32),
    "every use": FP8Recipe(weights_per_step=False),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("counts", [None, (30, 0, 41)])
def test_a_given_weight_is_computed_with_as_a_rounded_one(counts: tuple[int, ...] | None, recipe: FP8Recipe) -> None:
    x, grad = wild((71, 200), seed=1, octaves=1), wild((71, 130), seed=2, octaves=1)
    found = []
    for given_weight in (False, True):
        linear = Linear(200, 130) if counts is None else GroupedLinear(3, 200, 130)
        linear.weight.data = wild(tuple(linear.weight.shape), seed=0, octaves=2)
        if given_weight:
            given_layer(linear, blocks_of(tuple(linear.weight.shape), recipe.scales), recipe)
            assert linear.weight.isnan().all() and linear.weight.untyped_storage().nbytes() == 2
        else:
            linear.fp8 = FP8Layer(recipe)
        own = x.clone().requires_grad_()
        y = linear(own) if counts is None else linear(own, counts)
        y.backward(grad)
        assert own.grad is not None
        found.append((y.detach(), own.grad, main_grad(linear.weight)))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_a_given_weight_that_changes_unannounced_is_noticed() -> None:
    linear = Linear(64, 64)
    linear.weight.data = wild((64, 64), seed=0, octaves=0)
    blocks = blocks_of((64, 64))
    tensor = given_layer(linear, blocks, FP8Recipe())
    x = wild((8, 64), seed=1, octaves=0)
    before = linear(x)
    changed = blocks.quantise(2 * tensor.dequantise() + 1)
    tensor.values.copy_(changed.values)
    tensor.scales.copy_(changed.scales)
    with pytest.raises(StaleWeight, match="weights_changed"):
        linear(x)
    weights_changed(linear)
    assert not torch.equal(linear(x), before)


def test_a_given_weight_that_is_not_finite_is_named() -> None:
    linear = Linear(200, 130)
    linear.weight.data = wild((130, 200), seed=0, octaves=0)
    linear.weight.data[129, 3] = math.inf
    given_layer(linear, blocks_of((130, 200)), FP8Recipe())
    assert isinstance(linear.fp8, FP8Layer)
    linear(wild((8, 200), seed=1, octaves=0))
    assert linear.fp8.watch.first_non_finite == "weight of  (tile 1, 0)"
