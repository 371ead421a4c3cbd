"""SwiGLU kept in FP8 and recomputed: against the same function in separate steps, its bytes and its error."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from model.experts import Experts
from model.fp8.apply import apply_fp8
from model.fp8.config import FP8Config
from model.fp8.formats import Scales
from model.fp8.linear import FP8Layer, FP8Recipe
from model.fp8.swiglu import swiglu_linear
from model.linear import GroupedLinear, Linear
from model.mlp import MLP, swiglu
from model.recompute import keep_less
from model.rowwise.apply import apply_rowwise
from model.rowwise.kernels import TORCH, Rowwise, SwiGLUGradient
from model.rowwise.native import NativeRowwise
from model.weight_grad import main_grad
from tests.model.fp8.data import relative_error, wild
from tests.model.fp8.test_linear import Later, layer_of, saved_bytes


def run(linear: Linear | GroupedLinear, gate_up: Tensor, weights: Tensor | None, counts: tuple[int, ...] | None,
        grad: Tensor, recipe: FP8Recipe, *, fused: bool) -> list[Tensor]:  # fmt: skip
    gate_up = gate_up.detach().clone().requires_grad_()
    weights = None if weights is None else weights.detach().clone().requires_grad_()
    layer = FP8Layer(recipe)
    linear.weight.main_grad = torch.zeros(linear.weight.shape)  # type: ignore[attr-defined]
    if fused:
        y = swiglu_linear(gate_up, linear.weight, layer=layer, sink=linear.sink, row_weights=weights, counts=counts)
    else:
        y = layer(swiglu(gate_up, weights), linear.weight, linear.sink, counts)
    y.backward(grad)
    found = [y.detach(), gate_up.grad, main_grad(linear.weight), None if weights is None else weights.grad]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("fused", [True, False])
def test_no_rows_at_all(fused: bool) -> None:
    """A rank whose experts nobody chose."""
    counts = (0, 0)
    linear = layer_of(counts, 96, 160, torch.bfloat16)
    gate_up, grad = torch.zeros(0, 320, dtype=torch.bfloat16), torch.zeros(0, 96, dtype=torch.bfloat16)
    recipe = FP8Recipe(Scales.POWER_OF_TWO, exact=True)
    y, grad_gate_up, main, grad_weights = run(linear, gate_up, torch.zeros(0), counts, grad, recipe, fused=fused)
    assert (y.shape, grad_gate_up.shape, grad_weights.shape) == ((0, 96), (0, 320), (0,))
    assert not main.any()


@pytest.mark.parametrize("counts", [None, (70, 0, 58)])
@pytest.mark.parametrize("scales", Scales)
def test_is_the_separate_steps_at_the_rounded_input(scales: Scales, counts: tuple[int, ...] | None) -> None:
    linear = layer_of(counts, 96, 160, torch.bfloat16)
    gate_up, grad = wild((128, 320), seed=2, octaves=0), wild((128, 96), seed=3, octaves=0)
    weights = torch.rand(128, generator=torch.Generator().manual_seed(4)) if counts else None
    recipe = FP8Recipe(scales, exact=True)
    fused = run(linear, gate_up, weights, counts, grad, recipe, fused=True)
    plain = run(linear, gate_up, weights, counts, grad, recipe, fused=False)
    assert torch.equal(fused[0], plain[0])  # forward does not read the cache
    assert len(fused) == len(plain) == (3 if counts is None else 4)
    for found, wanted in zip(fused[1:], plain[1:], strict=True):
        assert 1e-3 < relative_error(found, wanted) < 0.07
    rounded = FP8Layer(recipe).input_rows.quantise(gate_up, counts).dequantise()
    at_rounded = run(linear, rounded, weights, counts, grad, recipe, fused=False)
    assert relative_error(fused[1], at_rounded[1]) < 4e-3
    if scales is Scales.POWER_OF_TWO:
        assert torch.equal(fused[1], at_rounded[1])


def test_keeps_fp8_of_its_input_and_nothing_of_its_output() -> None:
    linear = layer_of(None, 256, 512, torch.bfloat16)
    gate_up = wild((64, 1024), seed=5, octaves=0).requires_grad_()
    layer = FP8Layer(FP8Recipe())
    kept = saved_bytes(lambda: swiglu_linear(gate_up, linear.weight, layer=layer, sink=linear.sink), linear.weight)
    assert kept == 64 * (1024 + 8)
    wide = saved_bytes(lambda: linear(swiglu(gate_up)), linear.weight)
    assert wide == 64 * (2048 + 1024)


def test_a_weight_gradient_that_waits_holds_nothing_wide() -> None:
    linear, later = layer_of(None, 96, 160, torch.bfloat16), Later()
    gate_up, grad = wild((128, 320), seed=6, octaves=0).requires_grad_(), wild((128, 96), seed=7, octaves=0)
    layer = FP8Layer(FP8Recipe(), hold_rounded=True)
    swiglu_linear(gate_up, linear.weight, layer=layer, sink=later).backward(grad)
    seen = weakref.ref(grad.untyped_storage())
    del grad
    gc.collect()
    assert seen() is None and len(later.closures) == 1
    acc = torch.zeros(linear.weight.shape)
    later.closures[0](acc)
    assert acc.any()


@pytest.mark.parametrize(("fp8", "report"), [(True, False), (True, True), (False, True)])
def test_kernels_given_afterwards_are_used(fp8: bool, report: bool) -> None:
    """`apply_rowwise` comes after `apply_fp8`, and may come after `keep_less`."""
    calls: list[str] = []

    class Counting(NativeRowwise):
        def swiglu(self, gate_up: Tensor, weights: Tensor | None) -> Tensor:
            calls.append("forward")
            return super().swiglu(gate_up, weights)

        def swiglu_backward(self, gate_up: Tensor, weights: Tensor | None, grad: Tensor) -> SwiGLUGradient:
            calls.append("backward")
            return super().swiglu_backward(gate_up, weights, grad)

    def results(kernels: Rowwise) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        mlp, experts = MLP(48, 96), Experts(48, 32, range(2))
        both = nn.ModuleList([mlp, experts])
        for parameter in both.parameters():
            nn.init.normal_(parameter, std=0.2, generator=draw)
        if fp8:
            apply_fp8(both, FP8Config("oracle_exact", native=False))
        if report:
            keep_less(both)
        apply_rowwise(both, kernels)
        x, weights = torch.randn(7, 48, generator=draw).requires_grad_(), torch.rand(7, generator=draw).requires_grad_()
        out = experts(mlp(x), weights, (3, 4))
        out.square().sum().backward()
        assert x.grad is not None and weights.grad is not None
        return [out.detach(), x.grad, weights.grad, *(main_grad(parameter) for parameter in both.parameters())]

    plain, ours = results(TORCH), results(Counting())
    assert calls.count("backward") == 2 and calls.count("forward") == 4  # each once more for its weight gradient
    for found, wanted in zip(ours, plain, strict=True):
        assert relative_error(found, wanted) < 1e-5
