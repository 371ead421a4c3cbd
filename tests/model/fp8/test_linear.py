"""FP8 linears: gradients against the oracle, split backward, kept bytes and their error, stale weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.fp8 import reference
from model.fp8.formats import Scales, Tile
from model.fp8.linear import FP8Layer, FP8Recipe, InputCache, StaleWeight, weights_changed
from model.fp8.quantise import Quantiser
from model.linear import GroupedLinear, Linear
from model.weight_grad import AddGrad, main_grad
from tests.model.fp8.data import KERNELS, relative_error, same_bits, wild

EXACT = FP8Recipe(exact=True)


class Later:
    """A sink that keeps the closures, as the pipeline's does."""

    def __init__(self) -> None:
        self.closures: list[AddGrad] = []

    def put(self, weight: Tensor, add: AddGrad) -> None:
        self.closures.append(add)


def layer_of(counts: tuple[int, ...] | None, out: int, inner: int, dtype: torch.dtype) -> Linear | GroupedLinear:
    layer = Linear(inner, out) if counts is None else GroupedLinear(len(counts), inner, out)
    shape = tuple(layer.weight.shape)
    layer.weight.data = wild(shape, seed=1, octaves=0, dtype=dtype) * 0.05
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [None, (70, 0, 130)])
@pytest.mark.parametrize("exact", [True, False])
def test_three_products_and_no_more(exact: bool, counts: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    linear, out, inner = layer_of(counts, 96, 160, dtype), 96, 160
    x = wild((2, 100, inner), seed=2, octaves=0, dtype=dtype)
    x = (x if counts is None else x.flatten(0, 1)).requires_grad_()
    grad = wild((*x.shape[:-1], out), seed=3, octaves=0, dtype=dtype)
    sink = Later()
    y = FP8Layer(FP8Recipe(exact=exact))(x, linear.weight, sink, counts)
    y.backward(grad)
    assert y.shape == grad.shape and y.dtype == dtype and x.grad is not None and linear.weight.grad is None
    acc = torch.zeros(linear.weight.shape)
    (add,) = sink.closures
    add(acc)

    groups = counts or (200,)
    rows, columns, blocks = (Quantiser(tile, kernels=KERNELS["native"]) for tile in Tile)
    flat_x, flat_grad = x.detach().flatten(0, -2), grad.flatten(0, -2)
    w = blocks.quantise(linear.weight.detach(), (out,) * len(groups))
    kept = rows.quantise(flat_x, groups)
    wanted = (
        reference.fprop(kept, w),
        reference.dgrad(rows.quantise(flat_grad, groups), w),
        reference.wgrad(columns.quantise(flat_grad, groups), columns.requantise(kept)),
    )
    for found, oracle in zip((y, x.grad, acc), wanted, strict=True):
        if exact:
            assert torch.equal(found.detach(), oracle.to(found.dtype).view(found.shape))
        else:
            assert relative_error(found.detach(), oracle.view(found.shape)) < 3e-3


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("counts", [None, (300, 212)])
def test_error_against_float64_is_that_of_e4m3(scales: Scales, counts: tuple[int, ...] | None) -> None:
    linear = layer_of(counts, 256, 192, torch.bfloat16)
    x = wild((512, 192), seed=4, octaves=0).requires_grad_()
    grad = wild((512, 256), seed=5, octaves=0)
    y = FP8Layer(FP8Recipe(scales))(x, linear.weight, linear.sink, counts)
    y.backward(grad)
    stack = linear.weight.detach().double().view(-1, 256, 192)
    parts = (512,) if counts is None else counts
    pairs = list(zip(x.detach().double().split(parts), grad.double().split(parts), stack, strict=True))
    assert x.grad is not None
    assert relative_error(y.detach(), torch.cat([a @ w.t() for a, _, w in pairs])) < 3.85e-2
    assert relative_error(x.grad, torch.cat([g @ w for _, g, w in pairs])) < 3.85e-2
    # The weight gradient sees a second rounding of x where the scales are not powers of two.
    limit = 3.85e-2 if scales is Scales.POWER_OF_TWO else 4.8e-2
    wanted = torch.stack([g.t() @ a for a, g, _ in pairs]).view(linear.weight.shape)
    assert relative_error(main_grad(linear.weight), wanted) < limit


def saved_bytes(function: Any, weight: Tensor) -> int:
    """Bytes that autograd keeps for backward beside the weight."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(tensor.nbytes for tensor in kept if tensor.data_ptr() != weight.data_ptr())


@pytest.mark.parametrize(
    ("cache", "bytes_a_row", "limit"),
    [(InputCache.FP8, 512 + 4, 2.8e-2), (InputCache.WIDE, 512 + 4, 2.8e-2), (InputCache.E5M6, 768 + 4, 2.8e-2)],
)
def test_kept_bytes_and_the_weight_gradients_error(cache: InputCache, bytes_a_row: int, limit: float) -> None:
    linear = layer_of(None, 128, 512, torch.bfloat16)
    x, grad = wild((256, 512), seed=6, octaves=0).requires_grad_(), wild((256, 128), seed=7, octaves=0)
    layer = FP8Layer(FP8Recipe(input_cache=cache))
    assert saved_bytes(lambda: layer(x, linear.weight, linear.sink), linear.weight) == 256 * bytes_a_row
    assert saved_bytes(lambda: linear(x), linear.weight) == 256 * 1024
    layer(x, linear.weight, linear.sink).backward(grad)
    rounded = layer.gradient_columns.quantise(grad).dequantise().double()
    assert relative_error(main_grad(linear.weight), rounded.t() @ x.detach().double()) < limit


def test_keeping_wide_tiles_differs_from_requantising_only_in_rounding() -> None:
    grads = {}
    for scales in Scales:
        for cache in (InputCache.FP8, InputCache.WIDE):
            linear = layer_of(None, 64, 256, torch.bfloat16)
            x = wild((256, 256), seed=8, octaves=0).requires_grad_()
            layer = FP8Layer(replace(EXACT, scales=scales, input_cache=cache))
            layer(x, linear.weight, linear.sink).backward(wild((256, 64), seed=9, octaves=0))
            grads[scales, cache] = main_grad(linear.weight)
    power, wide = Scales.POWER_OF_TWO, Scales.FP32
    # Powers of two: the same relative rounding in every tile, so even the two orientations agree but for underflow.
    assert relative_error(grads[power, InputCache.FP8], grads[power, InputCache.WIDE]) < 1e-4
    assert 0.02 < relative_error(grads[wide, InputCache.FP8], grads[wide, InputCache.WIDE]) < 0.05


def test_native_and_plain_quantisers_give_the_same_gradients() -> None:
    found = []
    for native in (True, False):
        linear = layer_of((30, 41), 64, 200, torch.bfloat16)
        x = wild((71, 200), seed=10, octaves=2).requires_grad_()
        layer = FP8Layer(FP8Recipe(native=native, exact=True, input_cache=InputCache.E5M6))
        y = layer(x, linear.weight, linear.sink, (30, 41))
        y.backward(wild((71, 64), seed=11, octaves=2))
        assert x.grad is not None
        found.append((y.detach(), x.grad, main_grad(linear.weight)))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_a_weight_is_rounded_once_a_step_and_a_forgotten_update_is_noticed() -> None:
    linear = layer_of(None, 64, 64, torch.bfloat16)
    flat = linear.weight.detach().clone().flatten()
    linear.weight.data = flat.view(64, 64)  # as ZeRO's flat buffers: updates leave no trace in the version counter
    layer = FP8Layer(FP8Recipe())
    linear.fp8 = layer  # type: ignore[assignment]
    x = wild((8, 64), seed=12, octaves=0)
    before = layer(x, linear.weight, linear.sink)
    assert layer.weight(linear.weight) is layer.weight(linear.weight)
    flat.mul_(2)
    with pytest.raises(StaleWeight, match="weights_changed"):
        layer(x, linear.weight, linear.sink)
    weights_changed(torch.nn.Sequential(linear))
    assert torch.equal(layer(x, linear.weight, linear.sink), 2 * before)
    every_time = FP8Layer(FP8Recipe(weights_per_step=False))
    first = every_time(x, linear.weight, linear.sink)
    flat.mul_(2)
    assert torch.equal(every_time(x, linear.weight, linear.sink), 2 * first)


def test_gradients_below_the_floor_survive_only_without_it() -> None:
    for floor, survives in ((1e-4, False), (0.0, True)):
        linear = layer_of(None, 64, 64, torch.float32)
        x = wild((64, 64), seed=13, octaves=0, dtype=torch.float32).requires_grad_()
        layer = FP8Layer(FP8Recipe(gradient_amax_floor=floor))
        layer(x, linear.weight, linear.sink).backward(torch.full((64, 64), 1e-11))
        assert (
            x.grad is not None and bool(x.grad.any()) is survives and bool(main_grad(linear.weight).any()) is survives
        )


def test_nan_reaches_the_output_and_the_gradients() -> None:
    linear = layer_of(None, 32, 64, torch.bfloat16)
    x = wild((4, 64), seed=14, octaves=0)
    x[1, 3] = float("inf")
    y = FP8Layer(FP8Recipe())(x, linear.weight, linear.sink)
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()
