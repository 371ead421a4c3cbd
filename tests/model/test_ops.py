"""The hand-written backwards of norm, SwiGLU and linear layers equal torch autograd of the plain formula."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.experts import Experts
from model.init import initialise
from model.linear import GroupedLinear, Linear
from model.mlp import MLP, swiglu
from model.norm import RMSNorm
from model.weight_grad import AddGrad, ImmediateSink, main_grad, set_sink


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of its product with fixed random numbers."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, randn(*out.shape, seed=9, dtype=out.dtype)))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= tolerance, float(error)


def test_rms_norm_equals_its_formula() -> None:
    norm = RMSNorm(24, eps=1e-3)
    norm.weight.data.copy_(1 + 0.3 * randn(24, seed=1))
    x = 0.1 * randn(2, 5, 24, dtype=torch.float32)  # small, so that eps matters

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight

    expected, (grad_x, grad_weight) = gradients(plain, x.double(), norm.weight.double())
    out, (ours,) = gradients(norm, x)
    close(out.double(), expected, 2e-7)
    close(ours.double(), grad_x, 5e-7)
    close(main_grad(norm.weight).double(), grad_weight, 5e-7)
    assert norm.weight.grad is None


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    """The only rounding is that of the output: at most 2^-8 of each element."""
    norm = RMSNorm(512, eps=1e-6)
    x = randn(64, 512).bfloat16()
    out = norm(x)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_equals_its_formula(weighted: bool) -> None:
    gate_up, weights = randn(7, 12), randn(7, seed=1)

    def plain(gate_up: Tensor, *weights: Tensor) -> Tensor:
        gate, up = gate_up[..., :6], gate_up[..., 6:]
        out = gate * torch.sigmoid(gate) * up
        return out * weights[0][:, None] if weights else out

    inputs = (gate_up, weights) if weighted else (gate_up,)
    expected, grads = gradients(plain, *inputs)
    out, ours = gradients(swiglu, *inputs)
    close(out, expected, 1e-14)
    close(ours[0], grads[0], 1e-14)
    if weighted:  # a row weight's gradient is summed in FP32
        close(ours[1], grads[1], 1e-6)


def test_swiglu_of_no_rows_is_no_rows() -> None:
    out, grads = gradients(swiglu, randn(0, 12), randn(0, seed=1))
    assert (out.shape, grads[0].shape, grads[1].shape) == ((0, 6), (0, 12), (0,))


def test_linear_equals_torch() -> None:
    linear = Linear(6, 4)
    linear.weight.data = randn(4, 6, seed=1)
    x = randn(3, 5, 6)
    expected, (grad_x, grad_weight) = gradients(F.linear, x, linear.weight)
    out, (ours,) = gradients(linear, x)
    close(out, expected, 1e-14)
    close(ours, grad_x, 1e-14)
    close(main_grad(linear.weight), grad_weight, 1e-7)  # the accumulator is FP32


def test_linear_with_a_dtype_computes_in_it() -> None:
    """The router's product: FP32 although input and weight are BF16, to FP32 accuracy."""
    linear = Linear(256, 8, dtype=torch.float32)
    linear.weight.data = randn(8, 256, seed=1).bfloat16()
    x = randn(32, 256).bfloat16().requires_grad_()
    out = linear(x)
    assert out.dtype == torch.float32
    close(out.double(), x.double() @ linear.weight.double().t(), 1e-6)
    out.backward(randn(32, 8, seed=2).float())
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    close(main_grad(linear.weight).double(), randn(32, 8, seed=2).float().double().t() @ x.detach().double(), 1e-6)


@pytest.mark.parametrize("counts", [(3, 0, 4, 1), (0, 0, 8, 0), (8, 0, 0, 0), (0, 0, 0, 0), (1, 2, 3, 2)])
def test_grouped_linear_equals_one_linear_for_each_expert(counts: tuple[int, ...]) -> None:
    grouped = GroupedLinear(4, 6, 5)
    grouped.weight.data = randn(4, 5, 6, seed=1)
    x = randn(sum(counts), 6)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight, strict=True)])

    expected, (grad_x, grad_weight) = gradients(plain, x, grouped.weight)
    out, (ours,) = gradients(lambda x: grouped(x, counts), x)
    close(out, expected, 1e-14)
    close(ours, grad_x, 1e-14)
    close(main_grad(grouped.weight), grad_weight, 1e-7)
    empty = [e for e, count in enumerate(counts) if not count]
    assert not main_grad(grouped.weight)[empty].any()


@pytest.mark.parametrize("counts", [(63, 64, 65), (1, 0, 128), (0, 0, 0), (200, 1, 1), (1, 1, 1)])
def test_grouped_linear_in_bf16_equals_each_expert_alone(counts: tuple[int, ...]) -> None:
    """Whatever the rows' number: outputs and input gradients within BF16 rounding, weight gradients in FP32."""
    grouped = GroupedLinear(3, 16, 8)
    grouped.weight.data = randn(3, 8, 16, seed=1).bfloat16()
    x = randn(sum(counts), 16).bfloat16()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight, strict=True)])

    expected, (grad_x, grad_weight) = gradients(plain, x.double(), grouped.weight.double())
    x.requires_grad_()
    out = grouped(x, counts)
    out.backward(randn(*out.shape, seed=9).bfloat16())
    assert out.dtype == torch.bfloat16 and x.grad is not None
    if sum(counts):
        close(out.double(), expected, 4e-3)
        close(x.grad.double(), grad_x, 6e-3)
        close(main_grad(grouped.weight).double(), grad_weight, 6e-3)
    assert not main_grad(grouped.weight)[[e for e, count in enumerate(counts) if not count]].any()


def test_experts_weigh_the_outputs() -> None:
    """Multiplying the narrow activation by the router's weight is multiplying the output by it."""
    experts, counts = Experts(16, 8, range(3)), (4, 0, 2)
    initialise(experts, std=0.3, seed=0)
    rows, weights = randn(6, 16, dtype=torch.float32), randn(6, seed=1, dtype=torch.float32)

    def plain(rows: Tensor, weights: Tensor) -> Tensor:
        parts = zip(rows.split(counts), experts.gate_up_proj.weight, experts.down_proj.weight, strict=True)
        out = [F.linear(F.silu(x @ up[:8].t()) * (x @ up[8:].t()), down) for x, up, down in parts]
        return torch.cat(out) * weights[:, None]

    expected, grads = gradients(plain, rows, weights)
    out, ours = gradients(lambda rows, weights: experts(rows, weights, counts), rows, weights)
    close(out, expected, 1e-6)
    for mine, theirs in zip(ours, grads, strict=True):
        close(mine, theirs, 2e-6)


def test_contributions_add_up_over_micro_batches() -> None:
    linear = Linear(6, 4)
    linear.weight.data = randn(4, 6, seed=1, dtype=torch.float32)
    for seed in (2, 3):
        linear(randn(5, 6, seed=seed, dtype=torch.float32)).sum().backward()
    both = sum(torch.ones(4, 5) @ randn(5, 6, seed=seed, dtype=torch.float32) for seed in (2, 3))
    close(main_grad(linear.weight), torch.as_tensor(both), 1e-6)


def test_bf16_gradients_accumulate_in_fp32() -> None:
    """256 equal contributions of 1/256 each: BF16 sums would stop at 0.5 or before."""
    linear = Linear(1, 1)
    linear.weight.data = torch.ones(1, 1, dtype=torch.bfloat16)
    for _ in range(256):
        linear(torch.full((1, 1), 1.0, dtype=torch.bfloat16)).backward(torch.full((1, 1), 1 / 256).bfloat16())
    assert main_grad(linear.weight).dtype == torch.float32
    assert main_grad(linear.weight).item() == 1.0


def test_a_frozen_weight_gets_no_gradient() -> None:
    linear = Linear(6, 4)
    linear.weight.data = randn(4, 6)
    linear.weight.requires_grad_(False)
    linear(randn(5, 6).requires_grad_()).sum().backward()
    assert not hasattr(linear.weight, "main_grad")


def test_set_sink_reaches_every_layer_below() -> None:
    class Recorder(ImmediateSink):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, weight: Tensor, add: AddGrad) -> None:
            self.seen.append(id(weight))
            super().put(weight, add)

    mlp, recorder = MLP(6, 4), Recorder()
    initialise(mlp, std=0.1, seed=0)
    set_sink(mlp, recorder)
    mlp(randn(3, 6, dtype=torch.float32).requires_grad_()).sum().backward()
    assert sorted(recorder.seen) == sorted(map(id, mlp.parameters()))
