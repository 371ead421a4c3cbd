"""Fused weight-gradient products: their calls on stand-ins that read as the kernels do, against the wheel, refusals."""

import ast
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import backends, wgrad_kernels
from model.backends import MissingBackend
from model.dropping import project
from model.linear import GroupedLinear, Linear
from model.weight_grad import AddProduct, add_product, forget
from model.wgrad_kernels import add_product_kernel, apply_add_product
from tests.model.wheel import call_of, fits, function_of, parsed, transformer_engine_wheel

CPU = torch.device("cpu")


def flat_gemm(x: Tensor, grad: Tensor, acc: Tensor) -> None:
    """apex's kernel by address: x [rows, in], grad [rows, out], acc [out, in], read as dense whatever the strides."""
    rows, size, out = len(x), x.shape[1], len(acc)
    memory = [torch.as_strided(t, (t.numel(),), (1,)) for t in (x, grad, acc)]
    product = memory[1].view(rows, out).float().t() @ memory[0].view(rows, size).float()
    memory[2].view(out, size).add_(product)


def general_gemm(
    a: Tensor, b: Tensor, *, out_dtype: torch.dtype, layout: str, out: Tensor, accumulate: bool, grad: bool
) -> None:
    """What Transformer Engine's does in the layout NT: out += b^T a."""
    assert layout == "NT" and grad and out_dtype == out.dtype == torch.float32
    assert all(t.is_contiguous() for t in (a, b, out))
    out.mul_(accumulate).add_(b.float().t() @ a.float())


STANDS = {
    "apex": SimpleNamespace(wgrad_gemm_accum_fp32=flat_gemm),
    "transformer_engine": SimpleNamespace(general_gemm=general_gemm),
}


def kernel(monkeypatch: pytest.MonkeyPatch, name: str) -> AddProduct:
    for load in ("load_apex", "load_transformer_engine"):
        monkeypatch.setattr(wgrad_kernels, load, lambda *arguments: STANDS[name])
    return wgrad_kernels.ON_GPU[name]()


@pytest.mark.parametrize("name", STANDS)
def test_adds_what_the_twin_adds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    add, draw = kernel(monkeypatch, name), torch.Generator().manual_seed(0)
    stack = torch.randn(3, 24, 40, generator=draw)
    grad = torch.randn(50, 24, generator=draw).bfloat16()
    for x in (
        torch.randn(50, 40, generator=draw).bfloat16(),
        torch.randn(50, 64, generator=draw).bfloat16()[:, 8:48],  # a part of a wider tensor
    ):
        found, twin = stack.clone(), stack.clone()
        add(found[1], grad.t(), x)
        twin[1].addmm_(grad.float().t(), x.float())
        bound = 1e-6 * (grad.float().abs().t() @ x.float().abs())
        assert ((found[1] - twin[1]).abs() <= bound + 1e-6).all()
        assert torch.equal(found[0], stack[0]) and torch.equal(found[2], stack[2])
        add(found[1], grad.t(), x, overwrite=True)  # in place of what it held
        assert ((found[1] - (twin[1] - stack[1])).abs() <= bound + 1e-5).all()


@pytest.mark.parametrize("name", STANDS)
def test_fp32_factors_and_empty_groups_stay_with_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(STANDS, name, SimpleNamespace())  # has no kernel to call
    add, acc = kernel(monkeypatch, name), torch.zeros(3, 4)
    add(acc, torch.ones(5, 3).t(), torch.ones(5, 4))
    add(acc, torch.ones(0, 3).t().bfloat16(), torch.ones(0, 4).bfloat16())
    assert (acc == 5).all()
    add(acc, torch.ones(2, 3).t(), torch.ones(2, 4), overwrite=True)
    assert (acc == 2).all()


@pytest.mark.parametrize("name", STANDS)
def test_what_a_kernel_would_misread_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    add, left, right = kernel(monkeypatch, name), torch.ones(3, 5).bfloat16(), torch.ones(5, 4).bfloat16()
    with pytest.raises(ValueError, match=r"\(3, 4\) is torch.float32, dense False: it must be dense FP32"):
        add(torch.zeros(4, 3).t(), left, right)
    with pytest.raises(ValueError, match=r"torch.bfloat16, dense True"):
        add(torch.zeros(3, 4).bfloat16(), left, right)
    with pytest.raises(ValueError, match="do not fit"):
        add(torch.zeros(3, 5), left, right)


def test_linears_use_it() -> None:
    calls: list[tuple[tuple[int, ...], bool]] = []

    def add(acc: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
        calls.append((tuple(acc.shape), overwrite))
        add_product(acc, left, right, overwrite=overwrite)

    plain, ours = (torch.nn.ModuleList([Linear(6, 4), GroupedLinear(3, 6, 4)]) for _ in range(2))
    ours.load_state_dict({name: torch.nn.init.normal_(weight) for name, weight in plain.state_dict().items()})
    apply_add_product(ours, add)
    x, grad, counts = torch.randn(7, 6), torch.randn(7, 4), (2, 0, 5)
    model: Any
    for model in (plain, ours):
        for weight in model.parameters():
            forget(weight)
        model[0](x).backward(grad)
        model[1](x, counts).backward(grad)
        project(model[0], x, lambda: x).backward(grad)  # nothing of x kept
        project(model[1], x, lambda: x, counts).backward(grad)
    assert calls == [((4, 6), True)] * 3 + [((4, 6), False)] * 3 and Linear(6, 4).add_product is add_product
    for first, second in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(first.main_grad, second.main_grad)  # type: ignore[attr-defined]


def test_by_name() -> None:
    assert add_product_kernel("torch", CPU) is add_product
    for name in STANDS:
        with pytest.raises(MissingBackend, match=f"train.weight_grad={name} needs a GPU, the tensors are on cpu: use"):
            add_product_kernel(name, CPU)


@pytest.mark.parametrize("name", STANDS)
def test_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: None)
    with pytest.raises(MissingBackend) as caught:
        add_product_kernel(name, torch.device("cuda"))
    text = str(caught.value)
    assert text.startswith(f"train.weight_grad={name}") and "not installed" in text and "\n" not in text
    assert text.endswith("use train.weight_grad=torch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    yield from transformer_engine_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_called_as_transformer_engines_own_linear_calls_it(wheel: zipfile.ZipFile) -> None:
    ours = call_of(Path(wgrad_kernels.__file__), "self._extensions.general_gemm")
    assert fits(ours, function_of(parsed(wheel, "pytorch/cpp_extensions/gemm.py"), None, "general_gemm"))
    exported = parsed(wheel, "pytorch/cpp_extensions/__init__.py")
    assert any(isinstance(n, ast.ImportFrom) and n.module == "gemm" for n in exported.body)
    linear = ast.unparse(parsed(wheel, "pytorch/module/linear.py"))
    assert "general_gemm(x, dy, **wgrad_gemm_kwargs)" in linear
    theirs = next(
        {ast.literal_eval(key): value for key, value in zip(n.value.keys, n.value.values, strict=True) if key}
        for n in ast.walk(parsed(wheel, "pytorch/module/linear.py"))
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "wgrad_gemm_kwargs"
        and isinstance(n.value, ast.Dict)
    )  # fmt: skip
    given: dict[Any, Any] = {keyword.arg: keyword.value for keyword in ours.keywords}
    assert given.keys() <= theirs.keys()
    assert ast.unparse(theirs["layout"]) == ast.unparse(given["layout"]) == "'NT'"
    assert ast.unparse(theirs["grad"]) == ast.unparse(given["grad"]) == "True"
