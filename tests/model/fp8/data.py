"""Inputs and comparisons that the tests of FP8 share."""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from model.fp8.native import NativeKernels
from model.fp8.quantise import TorchKernels

KERNELS = {"torch": TorchKernels(), "native": NativeKernels()}


def all_bf16() -> Tensor:
    """Every finite BF16 number."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return x[x.isfinite()]


def wild(shape: tuple[int, ...], *, seed: int, octaves: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gaussian numbers times powers of two whose exponents are Gaussian too."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randn(shape, generator=generator) * octaves
    return (torch.randn(shape, generator=generator) * torch.exp2(exponents)).to(dtype)


def oracle_scales(amax: np.ndarray, *, power_of_two: bool, floor: float = 1e-4, largest: float = 448.0) -> np.ndarray:
    """FP32 scales of FP32 amax, by NumPy."""
    scales = np.maximum(amax.astype(np.float32), np.float32(floor)) / np.float32(largest)
    if not power_of_two:
        return scales
    mantissa, exponent = np.frexp(scales)
    return np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)


def oracle_codes(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """E4M3 bytes of x / scales by ml_dtypes."""
    return (x.astype(np.float32) / scales).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but any NaN equals any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.float().isnan() & b.float().isnan())).all())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of what was wanted, in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
