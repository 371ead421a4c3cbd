"""The compiled row-wise passes against their formulas in FP64, in both dtypes, whatever the shape and the threads."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.compiled import build
from model.experts import Experts
from model.mlp import MLP
from model.norm import RMSNorm
from model.rowwise import native
from model.rowwise.apply import apply_rowwise
from model.rowwise.kernels import TORCH, Rowwise
from model.rowwise.native import NativeRowwise
from model.weight_grad import main_grad

NATIVE = NativeRowwise()
EPS = 1e-6
# One rounding of the result: half a unit in the last place of BF16; in FP32 some units, of sums.
RTOL = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
shapes = st.tuples(st.integers(0, 70), st.integers(1, 150))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: Tensor, exact: Tensor, rtol: float, scale: float = 1.0) -> None:
    """Within rtol of each number, or of `scale` where numbers cancel."""
    torch.testing.assert_close(ours.double(), exact.double(), rtol=rtol, atol=rtol * scale)


def exact_gradients(f: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    wide = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*wide), wide, grad.double())


def norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def swiglu_formula(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights[:, None]


@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=dtypes)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, grad = (randn(*size, seed=i, dtype=dtype) for i, size in enumerate((shape, shape[1:], shape)))
    normed = NATIVE.rms_norm(x, weight, EPS)
    close(normed.y, norm_formula(x.double(), weight.double()), RTOL[dtype])
    gradient = NATIVE.rms_norm_backward(x, weight, normed.inverse_rms, grad)
    exact_x, exact_weight = exact_gradients(norm_formula, grad, x, weight)
    largest = float(normed.inverse_rms.max()) if len(x) else 1.0  # a short row may have any
    close(gradient.x, exact_x, RTOL[dtype], scale=8 * largest)
    close(gradient.weight, exact_weight, 3e-6, scale=8)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=dtypes, weighted=st.booleans())
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype, weighted: bool) -> None:
    gate_up, grad = randn(shape[0], 2 * shape[1], seed=0, dtype=dtype) * 4, randn(*shape, seed=1, dtype=dtype)
    weights = randn(shape[0], seed=2) if weighted else None
    ones = torch.ones(shape[0]) if weights is None else weights
    close(NATIVE.swiglu(gate_up, weights), swiglu_formula(gate_up.double(), ones.double()), RTOL[dtype], scale=1e-2)
    gradient = NATIVE.swiglu_backward(gate_up, weights, grad)
    exact_gate_up, exact_weights = exact_gradients(swiglu_formula, grad, gate_up, ones)
    close(gradient.gate_up, exact_gate_up, RTOL[dtype], scale=1.0)
    assert (gradient.weights is None) == (weights is None)
    if gradient.weights is not None:
        close(gradient.weights, exact_weights, 3e-6, scale=64)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=dtypes, scale=st.sampled_from([0.1, 3.0, 1e4]), gap=st.sampled_from([0, 16]))
def test_cross_entropy(shape: tuple[int, int], dtype: torch.dtype, scale: float, gap: int) -> None:
    logits = (randn(shape[0], shape[1] + gap, seed=0, dtype=dtype) * scale)[:, : shape[1]]
    labels = torch.randint(-1, shape[1], shape[:1], generator=torch.Generator().manual_seed(1))
    wide = logits.double().requires_grad_()
    exact = F.cross_entropy(wide, labels, reduction="none", ignore_index=-1)
    exact.sum().backward()
    assert wide.grad is not None
    loss = NATIVE.cross_entropy(logits, labels)
    assert loss.dtype == torch.float32 and not loss[labels < 0].any()
    close(loss, exact, 3e-6, scale=max(1.0, scale))
    close(logits, wide.grad, RTOL[dtype], scale=0.1 if dtype == torch.float32 else 1e-3)


def causal_softmax_formula(scores: Tensor, first: int) -> Tensor:
    beyond = torch.ones(scores.shape[1:], dtype=torch.bool).triu(first + 1)
    return scores.masked_fill(beyond, float("-inf")).softmax(-1)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3), rows=st.integers(1, 70), first=st.integers(0, 90), beyond=st.sampled_from([0, 0, 5]),
    dtype=dtypes, scale=st.sampled_from([0.1, 3.0, 1e4]),
)  # fmt: skip
def test_causal_softmax(heads: int, rows: int, first: int, beyond: int, dtype: torch.dtype, scale: float) -> None:
    size = first + rows + beyond
    scores, grad = randn(heads, rows, size, seed=0) * scale, randn(heads, rows, size, seed=1, dtype=dtype)
    exact = causal_softmax_formula(scores.double(), first)
    for kernels in (NATIVE, TORCH):
        p = kernels.causal_softmax(scores.clone(), first, dtype)
        assert p.dtype == dtype
        close(p, exact, RTOL[dtype] * 2, scale=1e-3)
        assert not p.masked_select(torch.ones(rows, size, dtype=torch.bool).triu(first + 1)).any()
        wide = p.double()
        exact_grad = wide * (grad.double() - (wide * grad.double()).sum(-1, keepdim=True))
        close(kernels.causal_softmax_backward(p, grad.clone(), first), exact_grad, RTOL[dtype] * 2, scale=1e-1)


@pytest.mark.parametrize("dtype", RTOL)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PIECE_ELEMENTS", 1 << 10)
    x, weight = randn(300, 96, seed=0, dtype=dtype), randn(96, seed=1, dtype=dtype)

    def everything() -> list[Tensor]:
        normed = NATIVE.rms_norm(x, weight, EPS)
        gradient = NATIVE.rms_norm_backward(x, weight, normed.inverse_rms, x)
        gate = NATIVE.swiglu_backward(x, x[:, 0].float(), x[:, :48])
        logits = x.clone()
        loss = NATIVE.cross_entropy(logits, torch.arange(300) % 96)
        assert gate.weights is not None
        return [normed.y, gradient.x, gradient.weight, gate.gate_up, gate.weights, logits, loss]

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_not_finite_stays_not_finite() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.full((1, 32), value)
        assert not NATIVE.rms_norm(x, torch.ones(32), EPS).y.isfinite().any()
        assert not NATIVE.swiglu(x, None).isfinite().any()
        assert not NATIVE.cross_entropy(x, torch.zeros(1, dtype=torch.int64)).isfinite().any()
        assert not NATIVE.causal_softmax(torch.full((1, 1, 32), value), 31, torch.float32).isfinite().any()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="float64 on cpu"):
        NATIVE.swiglu(torch.zeros(2, 4, dtype=torch.float64), None)
    with pytest.raises(ValueError, match="label 4 is beyond the vocabulary of 4"):
        NATIVE.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="row must be dense"):
        NATIVE.cross_entropy(torch.zeros(4, 2).t(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="from query 3 on"):
        NATIVE.causal_softmax(torch.zeros(2, 4, 6), 3, torch.float32)
    with pytest.raises(ValueError, match="for softmax of"):
        NATIVE.causal_softmax_backward(torch.zeros(2, 4, 6), torch.zeros(2, 4, 5), 2)


MUTATIONS = {
    "no pull of the row's own norm": ("- wide * pull)", "- 0 * pull)"),
    "gate without the slope of the sigmoid": ("* s * (1.0f + x * (1.0f - s))", "* s"),
    "a coarse exponential": ("filled(0.5f)", "filled(0.49f)"),
    "the label kept": ("* inverse - 1.0f", "* inverse"),
    "keys after the query": ("for (long j = seen; j < lanes; j++) row[j] = -INFINITY;", ""),
    "the tail left out": ("if (j < n) f(j, n - j);", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, (old, new) = (native.SOURCE, *native.HEADERS), MUTATIONS[name]
    assert sum(file.read_text().count(old) for file in files) == 1
    for file in files:
        (tmp_path / file.name).write_text(file.read_text().replace(old, new))
    monkeypatch.setattr(native, "SOURCE", tmp_path / native.SOURCE.name)
    monkeypatch.setattr(native, "HEADERS", tuple(tmp_path / file.name for file in native.HEADERS))
    monkeypatch.setattr(native, "build", partial(build, folder=tmp_path))
    monkeypatch.setitem(globals(), "NATIVE", NativeRowwise())
    with pytest.raises(AssertionError):
        for check in (test_rms_norm, test_swiglu, test_cross_entropy, test_causal_softmax):
            check()


def test_modules_use_what_they_are_given() -> None:
    def modules(kernels: Rowwise) -> list[Tensor]:
        torch.manual_seed(0)
        norm, mlp, experts = RMSNorm(8, EPS), MLP(8, 16), Experts(8, 16, range(2))
        for module in (norm, mlp, experts):
            apply_rowwise(module, kernels)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
        x = torch.randn(6, 8, requires_grad=True)
        out = experts(norm(x) + mlp(x), torch.rand(6), (2, 4))
        out.sum().backward()
        assert x.grad is not None
        return [out.detach(), x.grad, main_grad(norm.weight)]

    calls = []

    class Counting(NativeRowwise):
        def swiglu(self, gate_up: Tensor, weights: Tensor | None) -> Tensor:
            calls.append(gate_up.shape)
            return super().swiglu(gate_up, weights)

    for ours, plain in zip(modules(Counting()), modules(TORCH), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
