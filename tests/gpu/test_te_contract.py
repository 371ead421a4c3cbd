"""The oracle against Transformer Engine on any machine with a GPU of compute capability 9.0:

    python -m pytest tests/gpu/test_te_contract.py -m gpu

What must agree and how closely is in model/fp8/README.md, "Where a GPU back end must agree".
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.fp8.config import FP8Config
from model.fp8.formats import Tile
from model.fp8.linear import FP8Layer, FP8Recipe, InputCache
from model.fp8.quantise import Quantiser
from model.fp8.transformer_engine import MissingBackend, TransformerEngineLinear, load_engine
from model.fp8.weights import WeightBlocks, no_numbers
from model.linear import GroupedLinear, Linear
from model.weight_grad import main_grad, set_sink
from parallel.pipeline.weight_grad import DeferredSink

pytestmark = pytest.mark.gpu

# The oracle at the settings of Float8BlockScaling: no floor, both orientations from the wide tensor.
RECIPE = FP8Recipe(input_cache=InputCache.WIDE, exact=True, native=False, amax_floor=0.0, gradient_amax_floor=0.0)
# Outputs are rounded to BF16 on one side (1.7e-3 of Gaussian data in norm); FP8 itself costs 3.8e-2.
BAR = 4e-3


@pytest.fixture(scope="module")
def engine() -> tuple[Any, Any]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        return load_engine(FP8Config(backend="transformer_engine"))
    except MissingBackend as missing:
        pytest.skip(str(missing))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float().cpu() - b.float().cpu()).norm() / b.float().cpu().norm())


def data(*shape: int, seed: int, spread: bool) -> torch.Tensor:
    """BF16 Gaussian numbers; spread: tiles that differ by up to 2^12 in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if spread:
        x = x * torch.exp2(torch.randint(-6, 7, (shape[0], 1), generator=generator))
    return x.bfloat16()


@pytest.mark.parametrize(("dim", "tile"), [(1, Tile.ROW), (2, Tile.BLOCK)])
@pytest.mark.parametrize("spread", [False, True])
def test_rounded_numbers_are_equal(engine: Any, dim: int, tile: Tile, spread: bool) -> None:
    te, _ = engine
    quantizer = te.Float8BlockQuantizer(
        te.DType.kFloat8E4M3, rowwise=True, columnwise=False, amax_epsilon=0.0, force_pow_2_scales=True,
        block_scaling_dim=dim,
    )  # fmt: skip
    x = data(384, 512, seed=dim, spread=spread)
    x[5, :128] = 0  # a tile of zeros
    theirs = quantizer(x.cuda()).dequantize(dtype=torch.float32).cpu()
    ours = Quantiser(tile, amax_floor=0.0).quantise(x).dequantise(torch.float32)
    assert torch.equal(theirs, ours)


def both(engine: Any, *sizes: int) -> tuple[Any, Any]:
    """The oracle's layer on the CPU and Transformer Engine's on the GPU, same weight."""
    kind: Any = Linear if len(sizes) == 2 else GroupedLinear
    oracle, theirs = kind(*sizes), kind(*sizes)
    weight = torch.randn(oracle.weight.shape, generator=torch.Generator().manual_seed(3)).bfloat16() * 0.05
    oracle.weight.data, theirs.weight.data = weight, weight.cuda()
    te, recipe = engine
    oracle.fp8, theirs.fp8 = FP8Layer(RECIPE), TransformerEngineLinear(te, recipe, theirs.weight)
    return oracle, theirs


def compare(oracle: Any, theirs: Any, sizes: Any, counts: Any, *, spread: bool = False) -> None:
    """Output and both gradients of the same rows, weight gradients from zero."""
    rows = sum(counts) if counts else 300
    x, grad = data(rows, sizes[-2], seed=1, spread=spread), data(rows, sizes[-1], seed=2, spread=spread)
    results = []
    for layer, device in ((oracle, "cpu"), (theirs, "cuda")):
        main_grad(layer.weight).zero_()
        leaf = x.to(device).requires_grad_()
        y = layer(leaf, counts) if counts else layer(leaf)
        y.backward(grad.to(device))
        results.append((y.detach(), leaf.grad, layer.weight.main_grad))
    for name, expected, found in zip(("output", "input gradient", "weight gradient"), *results, strict=True):
        assert relative(found, expected) < BAR, name


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("sizes", "counts"), [
    ((512, 384), None),
    ((512, 576), None),  # out features that are not whole blocks, as of kv_a_proj_with_mqa
    ((4, 512, 384), (130, 0, 128, 70)),
])  # fmt: skip
def test_products_agree(engine: Any, sizes: Any, counts: Any, spread: bool) -> None:
    oracle, theirs = both(engine, *sizes)
    compare(oracle, theirs, sizes, counts, spread=spread)


@pytest.mark.parametrize(("sizes", "counts"), [((512, 576), None), ((4, 512, 384), (130, 0, 128, 70))])
def test_weights_in_fp8_alone(engine: Any, sizes: Any, counts: Any) -> None:
    """Its own quantised parameters over our bytes, before and after an update, against the oracle with these bytes."""
    te, recipe = engine
    kind: Any = Linear if len(sizes) == 2 else GroupedLinear
    oracle, theirs = kind(*sizes), kind(*sizes)
    blocks = WeightBlocks(tuple(oracle.weight.shape), Quantiser(Tile.BLOCK, amax_floor=0.0))
    masters = [torch.randn(oracle.weight.shape, generator=torch.Generator().manual_seed(n)) * 0.05 for n in range(2)]
    tensor = blocks.quantise(masters[0])
    on_gpu = replace(tensor, values=tensor.values.cuda(), scales=tensor.scales.cuda())
    oracle.weight.data = no_numbers(oracle.weight, torch.bfloat16)
    theirs.weight.data = no_numbers(theirs.weight.cuda(), torch.bfloat16)
    oracle.fp8, theirs.fp8 = FP8Layer(RECIPE), TransformerEngineLinear(te, recipe, theirs.weight, rounded=True)
    oracle.fp8.take_weight(tensor)
    theirs.fp8.take_weight(on_gpu)
    for master in masters:
        fresh = blocks.quantise(master)
        for held in (tensor, on_gpu):
            held.values.copy_(fresh.values)
            held.scales.copy_(fresh.scales)
        for layer in (oracle, theirs):
            layer.fp8.weights_changed()
        compare(oracle, theirs, sizes, counts)


def test_put_off_weight_gradients_add_up(engine: Any) -> None:
    oracle, theirs = both(engine, 256, 256)
    sink, put_off = DeferredSink(), []
    set_sink(theirs, sink)
    for seed in range(3):
        x, grad = (data(256, 256, seed=10 * seed + i, spread=False) for i in range(2))
        oracle(x.requires_grad_()).backward(grad)
        with sink.collecting(put_off):
            theirs(x.detach().cuda().requires_grad_()).backward(grad.cuda())
    assert not theirs.weight.main_grad.any(), "a weight gradient was not put off"
    sink.run(put_off)
    assert relative(theirs.weight.main_grad, oracle.weight.main_grad) < BAR


def test_a_weight_is_rounded_anew_after_an_update(engine: Any) -> None:
    oracle, theirs = both(engine, 256, 256)
    x = data(128, 256, seed=5, spread=False)
    for layer in (oracle, theirs):
        layer(x.to(layer.weight.device))
        layer.weight.data.mul_(1.7)
        layer.fp8.weights_changed()
    assert relative(theirs(x.cuda()), oracle(x)) < BAR
