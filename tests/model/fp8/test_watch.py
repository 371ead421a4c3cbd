"""Samples say what rounding did, every tensor of every layer once; the first tensor that is not finite is named."""

import math

import pytest
import torch

from model.fp8.apply import apply_fp8, fp8_linears
from model.fp8.config import FP8Config
from model.fp8.formats import Tile
from model.fp8.linear import FP8Layer, FP8Recipe, weights_changed
from model.fp8.quantise import Quantiser
from model.fp8.swiglu import FP8SwiGLU
from model.fp8.watch import TensorStats, Watch, tensor_stats, worst
from model.linear import GroupedLinear
from model.mlp import swiglu
from tests.model.fp8.test_apply import built, loss_of


def stats_of(x: torch.Tensor) -> TensorStats:
    return tensor_stats("layer", "input", x, Quantiser(Tile.ROW, amax_floor=0.0).quantise(x))


def test_figures_of_a_row_by_hand() -> None:
    x = torch.zeros(1, 128)
    x[0, :4] = torch.tensor([448.0, -448.0, 1.0, 2.0**-12])  # scale 1; half of the smallest subnormal is 2^-10
    found = stats_of(x)
    assert (found.amax, found.saturated, found.underflow) == (448.0, 2 / 128, 1 / 4)
    assert found.relative_error == pytest.approx(2.0**-12 / x.norm().item())


def test_gaussian_error_is_that_of_e4m3() -> None:
    found = stats_of(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)))
    assert 2.5e-2 < found.relative_error < 2.8e-2 and found.underflow < 1e-3


def test_zero_and_infinity() -> None:
    assert stats_of(torch.zeros(2, 128)).relative_error == 0
    x = torch.ones(2, 256)
    x[1, 130] = math.inf
    assert math.isnan(stats_of(x).relative_error)


def test_every_tensor_is_sampled_once_and_only_when_armed() -> None:
    model, watch = built(fp8=False), Watch()
    apply_fp8(model, FP8Config(native=False), watch=watch)
    loss_of(model).backward()
    assert watch.take() == []
    watch.arm()
    loss_of(model).backward()
    loss_of(model).backward()
    stats = watch.take()
    found = {(row.layer, row.tensor) for row in stats}
    assert len(found) == len(stats)
    for name in fp8_linears(model):
        assert {(name, tensor) for tensor in ("input", "weight", "gradient", "gradient_columns")} <= found
        assert ((name, "swiglu_input") in found) == name.endswith("down_proj")
    assert watch.first_non_finite is None


def test_first_non_finite_tensor_is_named() -> None:
    model, watch = built(fp8=False), Watch()
    apply_fp8(model, FP8Config(native=False), watch=watch)
    with torch.no_grad():
        model.get_parameter("layers.2.self_attn.q_a_layernorm.weight")[5] = math.inf
    assert not torch.isfinite(loss_of(model))
    assert watch.first_non_finite is not None and "layers.2.self_attn.q_b_proj" in watch.first_non_finite


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("recompute_swiglu", [True, False])
def test_a_router_weight_that_is_not_finite_shows_in_the_down_projection(recompute_swiglu: bool, exact: bool) -> None:
    """It enters between the SwiGLU's input, which is finite, and the product."""
    watch, linear = Watch(), GroupedLinear(2, 160, 96)
    torch.nn.init.normal_(linear.weight)
    layer = FP8Layer(FP8Recipe(exact=exact, native=False), "layers.1.mlp.experts.down_proj", watch)
    linear.fp8 = layer
    gate_up, row_weights = torch.randn(8, 320), torch.ones(8)
    row_weights[5] = math.nan
    if recompute_swiglu:
        FP8SwiGLU(layer)(gate_up, linear, row_weights, (3, 5))
    else:
        linear(swiglu(gate_up, row_weights), (3, 5))
    assert watch.first_non_finite == "input of layers.1.mlp.experts.down_proj (tile 5, 0)"


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("exact", [False, True])
def test_a_weight_that_is_not_finite_is_named(exact: bool, per_step: bool) -> None:
    model, watch = built(fp8=False), Watch()
    backend = "oracle_exact" if exact else "oracle_fast"
    apply_fp8(model, FP8Config(backend, native=False, weights_per_step=per_step), watch=watch)
    loss_of(model)
    assert watch.first_non_finite is None
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.experts.gate_up_proj.weight")[3, 0, 0] = math.nan
    weights_changed(model)
    for _ in range(2):  # the second finds the weight as it was rounded, NaN or not
        loss_of(model)
    rows = model.get_parameter("layers.1.mlp.experts.gate_up_proj.weight").shape[1]
    tile = 3 * -(-rows // 128)  # blocks start anew at every expert
    assert watch.first_non_finite == f"weight of layers.1.mlp.experts.gate_up_proj (tile {tile}, 0)"


@pytest.mark.parametrize("exact", [False, True])
def test_first_gradient_that_is_not_finite_is_named(exact: bool) -> None:
    model, watch = built(fp8=False), Watch()
    apply_fp8(model, FP8Config("oracle_exact" if exact else "oracle_fast", native=False), watch=watch)
    loss = loss_of(model)
    assert watch.first_non_finite is None
    (loss * 1e39).backward()
    # backwards: the loss after the MTP module comes first
    assert watch.first_non_finite is not None and watch.first_non_finite.startswith("gradient of mtp.0.block.mlp.")


def test_ranks_are_merged_by_the_worst() -> None:
    a, b = TensorStats("l", "input", 1.0, 0.5, 0.1, 0.2), TensorStats("l", "input", 2.0, 0.1, math.nan, 0.1)
    (found,) = worst([[a], [b]])
    assert (found.amax, found.saturated, found.relative_error) == (2.0, 0.5, 0.2) and math.isnan(found.underflow)
