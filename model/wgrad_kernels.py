"""Products that add to a weight's gradient in FP32 in one kernel: apex's and Transformer Engine's, torch's as twin.

The twin, `model.weight_grad.add_product`, already is one product with FP32 accumulation on a GPU; on all three the
operands are BF16 and the sum is added to `main_grad` in FP32, so they differ by the order of the sum alone: 1e-6 of
the sum of magnitudes. FP32 operands (the router's) stay with torch, whose FP32 products do not round to TF32.
tests/gpu/test_fused_contract.py holds them to the twin on a GPU, where they have not run.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.backends import MissingBackend, load_apex, load_transformer_engine
from model.weight_grad import AddProduct, Weighted, add_product

KEY, INSTEAD = "train.weight_grad", "use train.weight_grad=torch"
APEX_MODULE = "fused_weight_gradient_mlp_cuda"


class ApexAddProduct:
    """apex's `wgrad_gemm_accum_fp32`, which reads dense memory by address: rows of both operands one after another."""

    def __init__(self) -> None:
        self._cuda: Any = load_apex(f"{KEY}=apex", INSTEAD, APEX_MODULE)

    def __call__(self, acc: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
        """See AddProduct."""
        if overwrite:  # which the kernel cannot
            acc.zero_()
        if left.dtype == torch.float32 or not right.numel():
            add_product(acc, left, right)
            return
        _check(acc, left, right)
        self._cuda.wgrad_gemm_accum_fp32(right.contiguous(), left.t().contiguous(), acc)


class TransformerEngineAddProduct:
    """Transformer Engine's `general_gemm` as its own linear calls it with fuse_wgrad_accumulation."""

    def __init__(self) -> None:
        self._extensions: Any = load_transformer_engine(
            f"{KEY}=transformer_engine", INSTEAD, "transformer_engine.pytorch.cpp_extensions"
        )

    def __call__(self, acc: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
        """See AddProduct."""
        if left.dtype == torch.float32 or not right.numel():
            add_product(acc.zero_() if overwrite else acc, left, right)
            return
        _check(acc, left, right)
        self._extensions.general_gemm(
            right.contiguous(), left.t().contiguous(), out_dtype=torch.float32, layout="NT", out=acc,
            accumulate=not overwrite, grad=True,
        )  # fmt: skip


def _check(acc: Tensor, left: Tensor, right: Tensor) -> None:
    """The kernels look at addresses alone."""
    if acc.dtype != torch.float32 or not acc.is_contiguous():
        raise ValueError(f"a weight gradient of shape {tuple(acc.shape)} is {acc.dtype}, dense {acc.is_contiguous()}: "
                         "it must be dense FP32")  # fmt: skip
    if acc.shape != (len(left), right.shape[1]) or left.shape[1] != len(right) or left.dtype != right.dtype:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (acc, left, right))
        raise ValueError(f"a weight gradient and its factors do not fit: {shapes}")


ON_GPU = {"apex": ApexAddProduct, "transformer_engine": TransformerEngineAddProduct}


def add_product_kernel(name: str, device: torch.device) -> AddProduct:
    """torch | apex | transformer_engine, for tensors on `device`; MissingBackend in one line."""
    if name == "torch":
        return add_product
    if device.type != "cuda":
        raise MissingBackend(f"{KEY}={name} needs a GPU, the tensors are on {device}: {INSTEAD}")
    return ON_GPU[name]()


def apply_add_product(model: nn.Module, add: AddProduct) -> None:
    """Let the wide linears of `model` (a stage, or all of it) add their weight gradients so from now on.

    The output head adds its own in torch, in chunks; FP8 linears have products of their own.
    """
    for module in model.modules():
        if isinstance(module, Weighted):
            module.add_product = add
