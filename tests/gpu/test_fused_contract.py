"""Fused norms and weight-gradient products of apex and Transformer Engine against torch's, on a machine with a GPU:

    python -m pytest tests/gpu/test_fused_contract.py -m gpu

What of it is not installed is skipped by name. The bounds are those that the adapters' modules state.
"""

import pytest
import torch

from model.backends import MissingBackend
from model.rowwise.choose import ON_GPU, rowwise_kernels
from model.rowwise.kernels import TORCH, Rowwise
from model.weight_grad import add_product
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
