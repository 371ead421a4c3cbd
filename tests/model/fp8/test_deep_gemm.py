"""DeepGEMM's adapter against the oracle, over a stand-in that demands what its sources demand of shapes and layouts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import backends
from model.backends import MissingBackend
from model.fp8 import deep_gemm as adapter
from model.fp8.config import FP8Config
from model.fp8.deep_gemm import DeepGEMMGrouped, apply_deep_gemm, load_deep_gemm
from model.fp8.formats import Scales
from model.fp8.linear import FP8Layer, FP8Recipe, InputCache
from model.fp8.weights import WeightBlocks, no_numbers
from model.linear import GroupedLinear, Linear
from model.weight_grad import main_grad, set_sink
from parallel.pipeline.weight_grad import DeferredSink

CONFIG = FP8Config(recompute_swiglu=False)
COUNTS = (130, 0, 128, 3)


def rows_times_groups(a: Any, b: Any, d: Tensor, groups: Tensor) -> None:
    """d = a b[group]^T, as m_grouped_fp8_gemm_nt_contiguous on compute capability 9.0."""
    (a_values, a_scales), (b_values, b_scales) = a, b
    (rows, inner), (num_groups, out, inner_b) = a_values.shape, b_values.shape
    assert inner == inner_b and d.shape == (rows, out) and groups.shape == (rows,) and rows % 128 == 0
    assert (d.dtype, groups.dtype) == (torch.bfloat16, torch.int32)
    assert all(side.dtype == torch.float8_e4m3fn and side.is_contiguous() for side in (a_values, b_values))
    assert a_scales.dtype == b_scales.dtype == torch.float32 and b_scales.is_contiguous() and groups.is_contiguous()
    assert a_scales.shape == (rows, inner // 128) and b_scales.shape == (num_groups, out // 128, inner // 128)
    d.fill_(torch.nan)  # rows that fill up are not written
    left = a_values.double() * a_scales.double().repeat_interleave(128, 1)
    right = b_values.double() * b_scales.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    for start in range(0, rows, 128):
        block = slice(start, start + 128)
        group = int(groups[start])
        assert set(groups[block].tolist()) <= {group, -1} and group >= 0, "a block of rows has one group"
        mine = groups[block] == group
        d[block][mine] = (left[block] @ right[group].t())[mine].bfloat16()


def sums_over_tokens(a: Any, b: Any, d: Tensor, ks: Any, ks_tensor: Tensor, c: Tensor) -> None:
    """d = c + a b^T group by group, as k_grouped_fp8_gemm_nt_contiguous on compute capability 9.0."""
    num_groups, m, n = d.shape
    assert isinstance(ks, list) and len(ks) == num_groups
    assert ks_tensor.tolist() == ks and ks_tensor.dtype == torch.int32
    assert all(k % 128 == 0 for k in ks) and c is d and d.is_contiguous() and d.dtype == torch.float32
    start = 0
    for group, k in enumerate(ks):
        sides = []
        for (values, scales), size in ((a, m), (b, n)):
            assert values.shape == (sum(ks) * size,) and scales.shape == (size, sum(ks) // 128)
            assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32 and scales.stride(0) == 1
            part = values[start * size : (start + k) * size].view(size, k).double()
            sides.append(part * scales[:, start // 128 : (start + k) // 128].double().repeat_interleave(128, 1))
        d[group] += (sides[0] @ sides[1].t()).float()
        start += k


STAND: Any = SimpleNamespace(
    m_grouped_fp8_gemm_nt_contiguous=rows_times_groups, k_grouped_fp8_gemm_nt_contiguous=sums_over_tokens
)


def pair(scales: str, cache: str = "fp8", out: int = 256, inner: int = 384) -> tuple[GroupedLinear, GroupedLinear]:
    """The oracle's layer, and the same over DeepGEMM's stand-in."""
    oracle, ours = GroupedLinear(4, inner, out), GroupedLinear(4, inner, out)
    draw = torch.Generator().manual_seed(0)
    for layer in (oracle, ours):
        layer.weight.data = torch.randn(4, out, inner, generator=draw.manual_seed(0)).bfloat16() * 0.05
    kind = Scales.POWER_OF_TWO if scales == "pow2" else Scales.FP32
    oracle.fp8 = FP8Layer(
        FP8Recipe(scales=kind, input_cache=InputCache(cache), exact=True, native=False, gradient_amax_floor=0.0)
    )
    config = FP8Config(scales=scales, input_cache=cache, recompute_swiglu=False)
    ours.fp8 = DeepGEMMGrouped(STAND, config, ours.weight)
    return oracle, ours


def data(rows: int, size: int, seed: int) -> Tensor:
    """BF16 numbers whose rows differ by up to 2^12."""
    draw = torch.Generator().manual_seed(seed)
    rows_by = torch.exp2(torch.randint(-6, 7, (rows, 1), generator=draw))
    return (torch.randn(rows, size, generator=draw) * rows_by).bfloat16()


@pytest.mark.parametrize("cache", ["fp8", "wide"])
@pytest.mark.parametrize("scales", ["pow2", "fp32"])
def test_the_oracle_s_numbers(scales: str, cache: str) -> None:
    oracle, ours = pair(scales, cache)
    sink, put_off = DeferredSink(), []
    set_sink(ours, sink)
    x, grad = data(sum(COUNTS), 384, 1), data(sum(COUNTS), 256, 2)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [oracle(leaves[0], COUNTS)]
    outputs[0].backward(grad)
    with sink.collecting(put_off):
        outputs.append(ours(leaves[1], COUNTS))
        outputs[1].backward(grad)
    for first, second in ([y.detach() for y in outputs], [leaf.grad for leaf in leaves]):
        assert first is not None and second is not None and second.dtype == torch.bfloat16
        torch.testing.assert_close(second, first, rtol=2**-7, atol=1e-6 * float(first.abs().max()))
    assert not main_grad(ours.weight).any()
    for _ in range(2):  # adds up
        sink.run(list(put_off))
    expected, found = main_grad(oracle.weight), main_grad(ours.weight)
    torch.testing.assert_close(found, 2 * expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert not found[1].any()


@pytest.mark.parametrize("cache", ["fp8", "wide"])
def test_an_input_that_comes_again_gives_the_same_to_the_bit(cache: str) -> None:
    _, layer = pair("pow2", cache)
    product: Any = layer.fp8
    x, grad, results = data(sum(COUNTS), 384, 1), data(sum(COUNTS), 256, 2), []
    for again in (None, lambda: x):
        layer.weight.main_grad, leaf = None, x.clone().requires_grad_()  # type: ignore[attr-defined]
        arguments = (leaf, layer.weight, layer.sink, COUNTS)
        y = product(*arguments) if again is None else product.call_again(*arguments, again)
        y.backward(grad)
        results.append((y.detach(), leaf.grad, main_grad(layer.weight)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_a_weight_is_rounded_once_a_step() -> None:
    _, ours = pair("pow2")
    layer: Any = ours.fp8
    first = layer.rounded_weight(ours.weight)
    assert layer.rounded_weight(ours.weight) is first
    layer.weights_changed()
    assert layer.rounded_weight(ours.weight) is not first


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
def test_a_given_weight_is_read_as_a_rounded_one(scales: str) -> None:
    """The bytes that are given, no copy of them, and what they become after an update."""
    results = []
    _, layer = pair(scales)
    product: Any = layer.fp8
    for given in (False, True):
        layer.weight.main_grad = None  # type: ignore[attr-defined]
        if given:
            tensor = WeightBlocks(tuple(layer.weight.shape), product.blocks).quantise(layer.weight)
            layer.weight.data = no_numbers(layer.weight, torch.bfloat16)
            product.take_weight(tensor)
            assert product.rounded_weight(layer.weight)[0].data_ptr() == tensor.values.data_ptr()
        leaf = data(sum(COUNTS), 384, 1).requires_grad_()
        y = layer(leaf, COUNTS)
        y.backward(data(sum(COUNTS), 256, 2))
        results.append((y.detach(), leaf.grad, main_grad(layer.weight)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    before = product.rounded_weight(layer.weight)[1].clone()
    product._given.scales.add_(1)
    product.weights_changed()
    assert not torch.equal(product.rounded_weight(layer.weight)[1], before)


def test_only_experts_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "load_deep_gemm", lambda config: STAND)
    linear, experts = Linear(128, 128), GroupedLinear(2, 128, 128)
    apply_deep_gemm({"a": linear, "b": experts}, CONFIG)
    assert linear.fp8 is None and isinstance(experts.fp8, DeepGEMMGrouped)


def test_sizes_it_cannot_do_are_named() -> None:
    with pytest.raises(MissingBackend, match="the experts' weights are 96 x 128, its products take multiples of 128"):
        DeepGEMMGrouped(STAND, CONFIG, torch.zeros(2, 96, 128))


@pytest.mark.parametrize(
    ("found", "capability", "config", "words"),
    [
        (None, (9, 0), CONFIG, "DeepGEMM is not installed (2.1.1 or newer, below 2.7 is needed)"),
        ("1.0.0", (9, 0), CONFIG, "DeepGEMM 1.0.0 is installed, 2.1.1 or newer, below 2.7 is needed"),
        ("2.7.0+abc", (9, 0), CONFIG, "DeepGEMM 2.7.0+abc is installed"),
        ("2.6.1", None, CONFIG, "compute capability 9.0, there is no GPU"),
        ("2.6.1", (10, 0), CONFIG, "compute capability 9.0, this GPU has 10.0"),
        ("2.6.1", (9, 0), FP8Config(), "use fp8.recompute_swiglu=false"),
        ("2.6.1", (9, 0), CONFIG, "DeepGEMM cannot be imported (No module named 'deep_gemm')"),
    ],
)
def test_what_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, found: str | None, capability: Any, config: FP8Config, words: str
) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: found)
    monkeypatch.setattr(adapter.torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(adapter.torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(MissingBackend) as caught:
        load_deep_gemm(config)
    text = str(caught.value)
    assert text.startswith("fp8.grouped=deep_gemm") and words in text and "use fp8.grouped=same" in text
    assert "\n" not in text and caught.value.user_error
