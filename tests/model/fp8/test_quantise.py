"""The quantisers against ml_dtypes, exact fractions, torch's casts and the released kernel run from its source."""

import itertools
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.fp8.formats import Layout, QuantisedTensor, Rows, Scales, Tile, scale_shape
from model.fp8.quantise import Kernels, Quantiser
from model.fp8.watch import Watch
from tests.model.fp8.data import KERNELS, all_bf16, oracle_codes, oracle_scales, relative_error, same_bits, wild
from tests.model.fp8.published import run_published

EVERY = list(itertools.product(Tile, Scales))
kernels_of_both = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())


def check_against_oracle(tensor: QuantisedTensor, x: torch.Tensor, floor: float = 1e-4) -> None:
    """Every tile on its own, by NumPy and ml_dtypes."""
    rows, power = tensor.rows, tensor.power_of_two
    height, width = tensor.tile.value
    edges = list(range(len(x) + 1)) if height == 1 else list(rows.bounds)
    for i, (top, bottom) in enumerate(itertools.pairwise(edges)):
        for j, left in enumerate(range(0, x.shape[1], width)):
            part = x[top:bottom, left : left + width].float().numpy()
            scale = oracle_scales(np.abs(part).max(), power_of_two=power, floor=floor)
            assert tensor.wide_scales[i, j].numpy() == scale
            found = tensor.values[top:bottom, left : left + width].view(torch.uint8).numpy()
            assert (found == oracle_codes(part, scale)).all()


@kernels_of_both
@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("tile", Tile)
def test_every_bf16_number_at_a_tile_position(kernels: Kernels, tile: Tile, scales: Scales) -> None:
    x = all_bf16()
    for neighbour in (3.0, 2.0**100) if tile is Tile.BLOCK else (0.0, 448.0, 3.0, 1e-3, 2.0**100):
        matrix = torch.zeros(len(x), 128, dtype=torch.bfloat16)
        matrix[:, 0], matrix[:, 77] = neighbour, x
        counts = (1,) * len(x)  # each row a group of its own: every tile has one of the numbers
        if tile is Tile.COLUMN:
            matrix = torch.stack([torch.full_like(x, neighbour), x])
            counts = (2,)
        tensor, operand = Quantiser(tile, scales, kernels=kernels).both(matrix, counts)
        amax = np.maximum(np.abs(x.float().numpy()), torch.tensor(neighbour).bfloat16().float().numpy())
        wanted_scales = oracle_scales(amax, power_of_two=scales is Scales.POWER_OF_TWO)
        wanted = oracle_codes(x.float().numpy(), wanted_scales)
        values = tensor.values[1] if tile is Tile.COLUMN else tensor.values[:, 77]
        wide = operand.values[1] if tile is Tile.COLUMN else operand.values[:, 77]
        assert (tensor.wide_scales.flatten().numpy() == wanted_scales).all()
        assert (values.view(torch.uint8).numpy() == wanted).all()
        factor = wanted_scales if scales is Scales.POWER_OF_TWO else 1
        with np.errstate(over="ignore"):
            wanted_wide = wanted.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * factor
        assert (wide.float().numpy() == wanted_wide).all()


@kernels_of_both
@pytest.mark.parametrize(("tile", "scales"), EVERY)
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (130, 200), (257, 64)])
def test_ragged_shapes_tile_by_tile(kernels: Kernels, tile: Tile, scales: Scales, shape: tuple[int, int]) -> None:
    for dtype, octaves in itertools.product((torch.bfloat16, torch.float32), (0.0, 8.0)):
        x = wild(shape, seed=1, octaves=octaves, dtype=dtype)
        for floor in (1e-4, 1e-12):
            tensor = Quantiser(tile, scales, floor, kernels).quantise(x)
            assert tensor.scales.shape == scale_shape(tile, tensor.rows, shape[1])
            check_against_oracle(tensor, x, floor)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    columns=st.integers(1, 150),
    octaves=st.sampled_from([0.0, 3.0, 12.0, 40.0]),
    seed=st.integers(0, 1 << 30),
    floor=st.sampled_from([1e-4, 0.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    which=st.sampled_from(EVERY),
    bad=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
)
def test_native_kernels_give_the_bits_of_plain_torch(
    counts: list[int], columns: int, octaves: float, seed: int, floor: float, dtype: torch.dtype,
    which: tuple[Tile, Scales], bad: float | None,
) -> None:  # fmt: skip
    x = wild((sum(counts), columns), seed=seed, octaves=octaves, dtype=dtype)
    x[x.isinf()] = 1
    if bad is not None and x.numel():
        x.view(-1)[seed % x.numel()] = bad
    plain, native = (Quantiser(*which, floor, kernels) for kernels in KERNELS.values())
    (a, wide_a), (b, wide_b) = (quantiser.both(x, tuple(counts)) for quantiser in (plain, native))
    assert same_bits(a.values, b.values) and same_bits(a.scales, b.scales) and same_bits(wide_a.values, wide_b.values)
    assert same_bits(plain.quantise(x, tuple(counts)).values, native.quantise(x, tuple(counts)).values)
    assert same_bits(wide_a.values, native.operand(x, tuple(counts)).values)
    for wanted in (torch.bfloat16, torch.float32):
        assert same_bits(plain.kernels.decode(a, wanted), native.kernels.decode(b, wanted))
    assert same_bits(plain.as_operand(a).values, wide_b.values)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=4), columns=st.integers(1, 300),
    layout=st.sampled_from(Layout), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_layouts_hold_the_same_numbers(counts: list[int], columns: int, layout: Layout, seed: int) -> None:
    x = wild((sum(counts), columns), seed=seed, octaves=3)
    for tile in (Tile.COLUMN, Tile.ROW) if layout is not Layout.TURNED else (Tile.COLUMN,):
        plain, native = (Quantiser(tile, kernels=kernels, layout=layout) for kernels in KERNELS.values())
        wanted, found = (quantiser.operand(x, tuple(counts)) for quantiser in (plain, native))
        assert same_bits(wanted.values, found.values) and found.layout is layout
        cached = Quantiser(Tile.ROW).quantise(x, tuple(counts))
        wanted, found = (quantiser.requantised_operand(cached) for quantiser in (plain, native))
        assert same_bits(wanted.values, found.values)


@kernels_of_both
def test_power_of_two_is_never_below_the_scale_and_less_than_twice_it(kernels: Kernels) -> None:
    x = wild((512, 128), seed=2, octaves=10, dtype=torch.float32)
    wide, power = (Quantiser(Tile.ROW, scales, kernels=kernels).quantise(x).wide_scales for scales in Scales)
    assert ((power >= wide) & (power < 2 * wide)).all()
    assert (torch.frexp(power).mantissa == 0.5).all()


@kernels_of_both
def test_rounding_is_to_the_nearest_of_all_codes_by_exact_fractions(kernels: Kernels) -> None:
    x = torch.cat([wild((60, 1), seed=3, octaves=5, dtype=torch.float32), torch.full((60, 1), 448.0)], dim=1)
    tensor = Quantiser(Tile.ROW, kernels=kernels).quantise(x)
    codes = torch.arange(127, dtype=torch.uint8)
    numbers = [Fraction(float(value)) for value in codes.view(torch.float8_e4m3fn).float()]
    for row in range(60):
        wanted = abs(Fraction(float(x[row, 0]))) / Fraction(float(tensor.wide_scales[row, 0]))
        distances = [(abs(number - wanted), code & 1) for code, number in enumerate(numbers)]
        nearest = distances.index(min(distances))  # of two as near, the even code
        assert int(tensor.values[row, 0].view(torch.uint8)) & 0x7F == nearest


@kernels_of_both
@pytest.mark.parametrize("tile", Tile)
def test_zero_tiles_and_the_floor(kernels: Kernels, tile: Tile) -> None:
    x = torch.zeros(128, 128)
    at_floor = Quantiser(tile, Scales.FP32, kernels=kernels).quantise(x)
    assert (at_floor.wide_scales == torch.tensor(1e-4) / 448).all() and (at_floor.dequantise() == 0).all()
    without = Quantiser(tile, Scales.FP32, 0.0, kernels).quantise(x)
    assert (without.wide_scales == 1).all() and (without.dequantise() == 0).all()
    tiny = torch.full((128, 128), 1e-11)
    assert (Quantiser(tile, kernels=kernels).quantise(tiny).dequantise() == 0).all()
    assert relative_error(Quantiser(tile, Scales.POWER_OF_TWO, 0.0, kernels).quantise(tiny).dequantise(), tiny) < 0.07
    smallest = Quantiser(tile, Scales.POWER_OF_TWO, 0.0, kernels).quantise(torch.full((128, 128), 2.0**-140))
    assert (smallest.wide_scales == 2.0**-126).all()


@kernels_of_both
@pytest.mark.parametrize(("tile", "scales"), EVERY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_make_their_tile_nan_and_no_other(
    kernels: Kernels, tile: Tile, scales: Scales, bad: float
) -> None:
    x = wild((256, 256), seed=4, octaves=0)
    x[130, 200] = bad
    tensor, operand = Quantiser(tile, scales, kernels=kernels).both(x)
    height, width = tile.value
    row, col = 130 // height, 200 // width
    watch = Watch()
    watch.check("layer", "input", Quantiser(tile, scales, kernels=kernels).quantise(x[:128]).scales)
    assert watch.first_non_finite is None
    watch.check("layer", "input", tensor.scales)
    assert watch.first_non_finite == f"input of layer (tile {row}, {col})"
    in_tile = torch.zeros(256, 256, dtype=torch.bool)
    in_tile[row * height : (row + 1) * height, col * width : (col + 1) * width] = True
    for found in (tensor.dequantise(), kernels.decode(tensor, torch.float32), operand.values):
        assert torch.equal(found.isnan(), in_tile)


@pytest.mark.parametrize("scales", Scales)
def test_bytes_and_shape(scales: Scales) -> None:
    x = wild((2, 150, 200), seed=5, octaves=0)
    sizes = {Tile.ROW: 300 * 2, Tile.COLUMN: 3 * 200, Tile.BLOCK: 3 * 2}
    for tile, num_scales in sizes.items():
        tensor = Quantiser(tile, scales).quantise(x)
        assert tensor.num_bytes == 300 * 200 + num_scales * (1 if scales is Scales.POWER_OF_TWO else 4)
        assert tensor.dequantise().shape == x.shape


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
def test_requantising_with_powers_of_two_rounds_only_what_underflows(kernels: Kernels) -> None:
    for octaves in (0.0, 4.0):
        x = wild((300, 200), seed=6, octaves=octaves)
        cached = Quantiser(Tile.ROW, kernels=kernels).quantise(x, (100, 200))
        again = Quantiser(Tile.COLUMN, kernels=kernels).requantise(cached)
        assert again.rows.counts == (100, 200)
        before, after = cached.dequantise(torch.float32), again.dequantise(torch.float32)
        steps = before / (again.dequantise(torch.float32) * 0 + _spread_scales(again)) * 2**9
        whole = steps == steps.round()  # a multiple of E4M3's smallest step under the new scale
        assert torch.equal(before[whole], after[whole])
        assert not torch.equal(before, after) or whole.all()
        if not octaves:
            assert relative_error(after, before) < 1e-6


def _spread_scales(tensor: QuantisedTensor) -> torch.Tensor:
    return tensor.wide_scales.repeat_interleave(torch.tensor(tensor.rows.lengths), dim=0)


def test_requantising_with_fp32_scales_rounds_a_second_time() -> None:
    x = wild((1024, 512), seed=7, octaves=0)
    errors = {}
    for scales in Scales:
        cached = Quantiser(Tile.ROW, scales).quantise(x)
        again = Quantiser(Tile.COLUMN, scales).requantise(cached)
        errors[scales] = relative_error(again.dequantise(torch.float32), cached.dequantise(torch.float32))
    assert errors[Scales.POWER_OF_TWO] < 1e-6
    assert 0.02 < errors[Scales.FP32] < 0.03


def test_groups_do_not_share_tiles() -> None:
    x = torch.cat([torch.ones(60, 8), torch.full((60, 8), 1000.0)])
    tensor = Quantiser(Tile.COLUMN).quantise(x, (60, 60))
    assert tensor.rows == Rows((60, 60), (0, 60, 120)) and tensor.scales.shape == (2, 8)
    assert (tensor.wide_scales[0] == 2**-8).all() and (tensor.wide_scales[1] == 4).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match="float16"):
        Quantiser(Tile.ROW).quantise(torch.zeros(2, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="3 rows in all do not fit 2 rows"):
        Quantiser(Tile.ROW).quantise(torch.zeros(2, 2), (1, 2))
    with pytest.raises(ValueError, match="rows, columns"):
        Quantiser(Tile.ROW).quantise(torch.zeros(2))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
def test_the_released_act_quant_run_from_its_source(kernels: Kernels, tmp_path: Path) -> None:
    every = all_bf16()
    exhaustive = torch.zeros(len(every), 128, dtype=torch.bfloat16)
    exhaustive[:, 0], exhaustive[:, 5] = every, 3.0
    x = torch.cat([exhaustive, *(wild((2000, 128), seed=8, octaves=octaves) for octaves in (0.0, 5.0, 20.0))])
    published = run_published(tmp_path, x=x.view(torch.int16).numpy())
    for scales in Scales:
        tensor = Quantiser(Tile.ROW, scales, kernels=kernels).quantise(x)
        assert (tensor.wide_scales.numpy() == published[f"{scales.value}_scales"]).all()
        assert (tensor.values.view(torch.uint8).numpy() == published[f"{scales.value}_values"]).all()
