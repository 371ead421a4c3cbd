"""Fused norms and weight-gradient products against torch's, DeepGEMM's against the oracle's, on a machine with a GPU:

    python -m pytest tests/gpu/test_fused_contract.py -m gpu

What of it is not installed is skipped by name. The bounds are those that the adapters' modules state.
"""

import pytest
import torch

from model.backends import MissingBackend
from model.fp8.config import FP8Config
from model.fp8.deep_gemm import DeepGEMMGrouped, load_deep_gemm
from model.fp8.formats import Scales
from model.fp8.linear import FP8Layer, FP8Recipe, InputCache
from model.linear import GroupedLinear
from model.rowwise.choose import ON_GPU, rowwise_kernels
from model.rowwise.kernels import TORCH, Rowwise
from model.weight_grad import add_product, main_grad
from model.wgrad_kernels import add_product_kernel

pytestmark = pytest.mark.gpu

BOUND = {"apex": 3 * 2**-8, "transformer_engine": 2**-7}


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda")


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ON_GPU)
def test_norms(gpu: torch.device, name: str, dtype: torch.dtype) -> None:
    try:
        fused: Rowwise = rowwise_kernels(name, gpu)
    except MissingBackend as missing:
        pytest.skip(str(missing))
    bound = BOUND[name] if dtype == torch.bfloat16 else 1e-5
    for size in (512, 1536, 7168):
        x, weight, grad = (numbers(*s, seed=i).to(dtype) for i, s in enumerate(((300, size), (size,), (300, size))))
        found, twin = fused.rms_norm(x, weight, 1e-6), TORCH.rms_norm(x, weight, 1e-6)
        torch.testing.assert_close(found.y, twin.y, rtol=bound, atol=0)
        torch.testing.assert_close(found.inverse_rms, twin.inverse_rms, rtol=1e-5, atol=0)
        backward = [k.rms_norm_backward(x, weight, found.inverse_rms, grad) for k in (fused, TORCH)]
        for ours, theirs in zip(*((b.x, b.weight) for b in backward), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["apex", "transformer_engine"])
def test_weight_gradients(gpu: torch.device, name: str) -> None:
    try:
        add = add_product_kernel(name, gpu)
    except MissingBackend as missing:
        pytest.skip(str(missing))
    for rows, out, size in ((512, 384, 256), (130, 2048, 7168), (1, 64, 64)):
        grad, x = numbers(rows, out, seed=1).bfloat16(), numbers(rows, size, seed=2).bfloat16()
        found = numbers(out, size, seed=3)
        twin = found.clone()
        add(found, grad.t(), x)
        add_product(twin, grad.t(), x)
        bound = 1e-6 * (grad.float().abs().t() @ x.float().abs() + twin.abs())
        assert ((found - twin).abs() <= bound).all()


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("cache", ["fp8", "wide"])
def test_experts_by_deep_gemm(gpu: torch.device, scales: str, cache: str) -> None:
    """Outputs are rounded to BF16, and the tensor core drops bits inside a block: 4e-3 in norm."""
    config = FP8Config(scales=scales, input_cache=cache, recompute_swiglu=False)
    try:
        gemm = load_deep_gemm(config)
    except MissingBackend as missing:
        pytest.skip(str(missing))
    kind, counts = Scales.POWER_OF_TWO if scales == "pow2" else Scales.FP32, (130, 0, 128, 3)
    oracle, ours = GroupedLinear(4, 512, 256), GroupedLinear(4, 512, 256)
    weight, x, grad = numbers(4, 256, 512, seed=1) * 0.05, numbers(261, 512, seed=2), numbers(261, 256, seed=3)
    oracle.weight.data, ours.weight.data = weight.bfloat16().cpu(), weight.bfloat16()
    recipe = FP8Recipe(scales=kind, input_cache=InputCache(cache), exact=True, native=False, gradient_amax_floor=0.0)
    oracle.fp8, ours.fp8 = FP8Layer(recipe), DeepGEMMGrouped(gemm, config, ours.weight)
    results = []
    for layer in (oracle, ours):
        leaf = x.bfloat16().to(layer.weight.device).requires_grad_()
        y = layer(leaf, counts)
        y.backward(grad.bfloat16().to(y.device))
        results.append([t.detach().float().cpu() for t in (y, leaf.grad, main_grad(layer.weight)) if t is not None])
    for wanted, found in zip(*results, strict=True):
        assert (found - wanted).norm() < 4e-3 * wanted.norm()
