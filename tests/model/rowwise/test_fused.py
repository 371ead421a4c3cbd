"""RMSNorm by apex and Transformer Engine: their calls on stand-ins with the kernels' roundings, against the wheel."""

import ast
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import backends
from model.backends import MissingBackend
from model.norm import RMSNorm
from model.rowwise import apex, transformer_engine
from model.rowwise.apply import apply_rowwise
from model.rowwise.choose import ON_GPU, rowwise_kernels
from model.rowwise.kernels import TORCH, Rowwise
from model.rowwise.native import NativeRowwise
from model.weight_grad import main_grad
from tests.model.wheel import call_of, parsed, transformer_engine_wheel

EPS = 1e-6
TE_DTYPE = {torch.bfloat16: "kBFloat16", torch.float32: "kFloat32"}
# Of each number, in BF16: roundings of 2^-8 on either side, see the modules.
BOUND = {"apex": 3 * 2**-8, "transformer_engine": 2**-7}


def statistics(x: Tensor, eps: float) -> Tensor:
    return (x.float().square().mean(-1) + eps).rsqrt()


def gradients(grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """In FP32, then in the dtypes of x and the weight."""
    assert inverse_rms.shape == (len(x),) and inverse_rms.dtype == torch.float32
    scaled, inverse = grad.float() * weight.float(), inverse_rms.unsqueeze(1)
    hat = x.float() * inverse
    grad_x = inverse * (scaled - hat * (scaled * hat).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad.float() * hat).sum(0).to(weight.dtype)


def dense(*tensors: Tensor) -> None:
    assert all(t.is_contiguous() for t in tensors) and len({t.dtype for t in tensors}) == 1 and len(tensors[0])


class StandApex:
    def rms_forward_affine(self, x: Tensor, shape: Any, weight: Tensor, eps: float) -> list[Tensor]:
        dense(x, weight)
        assert tuple(shape) == weight.shape == x.shape[-1:]
        inverse_rms = statistics(x, eps)
        return [weight * (x.float() * inverse_rms.unsqueeze(1)).to(x.dtype), inverse_rms]

    def rms_backward_affine(
        self, grad: Tensor, inverse_rms: Tensor, x: Tensor, shape: Any, weight: Tensor, eps: float, output_kept: bool
    ) -> list[Tensor]:
        dense(grad, x, weight)
        assert tuple(shape) == weight.shape and not output_kept and eps >= 0
        return list(gradients(grad, x, inverse_rms, weight))


class StandTransformerEngine:
    TE_DType = TE_DTYPE

    def rmsnorm_fwd(
        self, x: Tensor, weight: Tensor, eps: float, out: None, quantizer: None, dtype: str, margin: int, centred: bool
    ) -> list[Tensor | None]:
        dense(x, weight)
        assert dtype == TE_DTYPE[x.dtype] and out is quantizer is None and margin == 0 and not centred
        inverse_rms = statistics(x, eps)
        return [(x.float() * inverse_rms.unsqueeze(1) * weight.float()).to(x.dtype), None, inverse_rms]

    def rmsnorm_bwd(
        self, grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor, margin: int, centred: bool
    ) -> list[Tensor]:
        dense(grad, x, weight)
        assert margin == 0 and not centred
        return list(gradients(grad, x, inverse_rms, weight))


@pytest.fixture(params=ON_GPU)
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rowwise:
    monkeypatch.setattr(apex, "load_apex", lambda *arguments: StandApex())
    monkeypatch.setattr(transformer_engine, "load_transformer_engine", lambda *arguments: StandTransformerEngine())
    return ON_GPU[request.param]()


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_bound_of_the_twin(fused: Rowwise, dtype: torch.dtype) -> None:
    wide = numbers(37, 120, seed=0, dtype=dtype)
    weight, grad = numbers(96, seed=1, dtype=dtype), numbers(37, 96, seed=2, dtype=dtype)
    name = next(name for name, kind in ON_GPU.items() if type(fused) is kind)
    bound = BOUND[name] if dtype == torch.bfloat16 else 2e-6
    for x in (numbers(37, 96, seed=3, dtype=dtype), wide[:, 8:104]):  # also a part of a wider tensor, as of a latent
        found, twin = fused.rms_norm(x, weight, EPS), TORCH.rms_norm(x, weight, EPS)
        assert found.y.dtype == dtype and found.inverse_rms.shape == (37, 1)
        torch.testing.assert_close(found.y, twin.y, rtol=bound, atol=0)
        torch.testing.assert_close(found.inverse_rms, twin.inverse_rms, rtol=1e-6, atol=0)
        backward = [k.rms_norm_backward(x, weight, found.inverse_rms, grad) for k in (fused, TORCH)]
        assert backward[0].weight.dtype == torch.float32
        for ours, theirs in zip(*((b.x, b.weight) for b in backward), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound * float(theirs.abs().max()))


def test_no_rows(fused: Rowwise) -> None:
    x, weight = torch.zeros(0, 8), torch.ones(8)
    normed = fused.rms_norm(x, weight, EPS)
    gradient = fused.rms_norm_backward(x, weight, normed.inverse_rms, x)
    assert normed.y.shape == (0, 8) and gradient.x.shape == (0, 8) and not gradient.weight.any()


def test_a_norm_uses_it(fused: Rowwise) -> None:
    plain, ours = RMSNorm(32, EPS), RMSNorm(32, EPS)
    apply_rowwise(ours, fused)
    x, grad = numbers(2, 5, 32, seed=4, dtype=torch.float32), numbers(2, 5, 32, seed=5, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for norm, leaf in zip((plain, ours), leaves, strict=True):
        norm(leaf).backward(grad)
    assert ours.rowwise is fused
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(main_grad(ours.weight), main_grad(plain.weight), rtol=1e-5, atol=1e-5)


def test_by_name() -> None:
    cpu = torch.device("cpu")
    assert rowwise_kernels("torch", cpu) is TORCH and isinstance(rowwise_kernels("native", cpu), NativeRowwise)
    for name in ON_GPU:
        with pytest.raises(MissingBackend, match=f"train.rowwise={name} needs a GPU, the tensors are on cpu: use"):
            rowwise_kernels(name, cpu)


@pytest.mark.parametrize("name", ON_GPU)
def test_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: None)
    with pytest.raises(MissingBackend) as caught:
        rowwise_kernels(name, torch.device("cuda"))
    text = str(caught.value)
    assert text.startswith(f"train.rowwise={name}") and "not installed" in text and text.endswith("train.rowwise=torch")
    assert "\n" not in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    yield from transformer_engine_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_called_as_transformer_engines_own_norm_calls_it(wheel: zipfile.ZipFile) -> None:
    theirs = parsed(wheel, "pytorch/ops/basic/rmsnorm.py")
    assert "from transformer_engine_torch import rmsnorm_bwd, rmsnorm_fwd" in ast.unparse(theirs)
    expected = {
        "rmsnorm_fwd": ["x", "w", "self.eps", "None", "next_op_input_quantizer", "TE_DType[dtype]", "sm_margin",
                        "self.zero_centered_gamma"],
        "rmsnorm_bwd": ["dy", "x", "rstdevs", "w", "self._sm_margins['backward']", "self.zero_centered_gamma"],
    }  # fmt: skip
    ours = {
        "rmsnorm_fwd": ["x.contiguous()", "weight.to(x.dtype)", "eps", "None", "None", "self._dtypes[x.dtype]",
                        "SM_MARGIN", "ZERO_CENTERED"],
        "rmsnorm_bwd": ["grad.contiguous()", "x.contiguous()", "inverse_rms.squeeze(1)", "weight.to(x.dtype)",
                        "SM_MARGIN", "ZERO_CENTERED"],
    }  # fmt: skip
    for name, arguments in expected.items():
        (call,) = [n for n in ast.walk(theirs) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]
        assert [ast.unparse(a) for a in call.args] == arguments and not call.keywords
        call = call_of(Path(transformer_engine.__file__), f"self._tex.{name}")
        assert [ast.unparse(a) for a in call.args] == ours[name] and not call.keywords
    assert "y, _, rstdevs = rmsnorm_fwd(" in ast.unparse(theirs) and "dx, dw = rmsnorm_bwd(" in ast.unparse(theirs)
    constants = ast.unparse(parsed(wheel, "pytorch/constants.py"))
    assert "TE_DType" in constants and "torch.bfloat16:" in constants and "torch.float32:" in constants
