"""Gathering, quantising and adding up rows on one rank: one function each, with a back end chosen by name.

`torch` is the plain form and the definition, `triton` the kernel; results are the same bits. Nothing falls back: asking
for `triton` where it is not installed, or with tensors that it cannot reach, raises.

An FP8 row is E4M3 values and, for every tile of 1 x 128 columns (the last may be shorter), one byte e that stands for
the scale 2^(e - 127): the least power of two of at least amax / 448, amax taken to be at least 1e-4 (report section
3.3.2, with scales a power of two as the report has them for dispatch) or another floor; of a tile of zeros without a
floor the scale is 1. A tile with NaN or infinity has e = 255 and NaN
throughout, so that neither is lost on the way.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from model.fp8.formats import AMAX_FLOOR, num_strips
from parallel.expert.kernels import reference

BACKENDS = ("torch", "triton")


class KernelError(ValueError):
    """A back end that is not there, or tensors that do not fit; the message names which and what would work."""

    user_error = True


@dataclass(frozen=True)
class QuantisedRows:
    """values_RD: E4M3. exponents_RG: uint8, one for each tile of 128 columns, scale 2^(e - 127)."""

    values_RD: Tensor
    exponents_RG: Tensor


def gather(x_TD: Tensor, source_R: Tensor, *, backend: str) -> Tensor:
    """Rows of x by number, in the given order: [R, D], of any type; source_R int64, each from 0 to T - 1."""
    kernels = _kernels(backend, x_TD, source_R)
    _require(x_TD.ndim == 2, "x_TD", x_TD, "two dimensions")
    _require(source_R.ndim == 1 and source_R.dtype == torch.int64, "source_R", source_R, "int64 [R]")
    return kernels.gather(x_TD.contiguous(), source_R.contiguous())


def quantise(x_RD: Tensor, *, amax_floor: float = AMAX_FLOOR, backend: str) -> QuantisedRows:
    """Rows of BF16 or FP32 as FP8, rounded to nearest, ties to even; amax_floor: 0 for gradients, else flushed."""
    kernels = _kernels(backend, x_RD)
    fits = x_RD.ndim == 2 and x_RD.dtype in (torch.bfloat16, torch.float32)
    _require(fits, "x_RD", x_RD, "bfloat16 or float32 [R, D]")
    return QuantisedRows(*kernels.quantise(x_RD.contiguous(), amax_floor))


def dequantise(rows: QuantisedRows, *, dtype: torch.dtype, backend: str) -> Tensor:
    """FP8 rows multiplied out, exact in BF16 and in FP32: [R, D]."""
    values_RD, exponents_RG = rows.values_RD, rows.exponents_RG
    kernels = _kernels(backend, values_RD, exponents_RG)
    fits = values_RD.ndim == 2 and values_RD.dtype == torch.float8_e4m3fn
    _require(fits, "values_RD", values_RD, "float8_e4m3fn [R, D]")
    shape = (len(values_RD), num_strips(values_RD.shape[1]))
    fits = exponents_RG.shape == shape and exponents_RG.dtype == torch.uint8
    _require(fits, "exponents_RG", exponents_RG, f"uint8 {list(shape)}")
    if dtype not in (torch.bfloat16, torch.float32):
        raise KernelError(f"dtype={dtype}: dequantise gives bfloat16 or float32")
    return kernels.dequantise(values_RD.contiguous(), exponents_RG.contiguous(), dtype)


def combine(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None, *, backend: str) -> Tensor:
    """For each token the (weighted) sum of its rows: BF16 [T, D].

    row_TK: int64, number of the row of each copy, -1 for none. weights_TK: FP32. The sum is taken in FP32, from zero in
    the order of k, each product rounded before it is added, and rounded to BF16 once.
    """
    kernels = _kernels(backend, rows_RD, row_TK, *([] if weights_TK is None else [weights_TK]))
    _require(rows_RD.ndim == 2 and rows_RD.dtype == torch.bfloat16, "rows_RD", rows_RD, "bfloat16 [R, D]")
    _require(row_TK.ndim == 2 and row_TK.dtype == torch.int64, "row_TK", row_TK, "int64 [T, K]")
    if weights_TK is not None:
        fits = weights_TK.shape == row_TK.shape and weights_TK.dtype == torch.float32
        _require(fits, "weights_TK", weights_TK, f"float32 {list(row_TK.shape)}")
        weights_TK = weights_TK.contiguous()
    return kernels.combine(rows_RD.contiguous(), row_TK.contiguous(), weights_TK)


def _kernels(backend: str, *tensors: Tensor) -> ModuleType:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise KernelError(f"tensors on {' and '.join(sorted(map(str, devices)))}: all must be on one device")
    if backend == "torch":
        return reference
    if backend != "triton":
        raise KernelError(f"backend={backend}: use {' or '.join(BACKENDS)}")
    try:
        from parallel.expert.kernels import triton_rows
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise KernelError("backend=triton: triton is not installed; pip install triton, or use torch") from None
    device = devices.pop()
    if device.type != "cuda" and not triton_rows.is_interpreted():
        raise KernelError(f"backend=triton: tensors are on {device}, its kernels run on cuda; use torch")
    return triton_rows


def _require(fits: bool, name: str, tensor: Tensor, wanted: str) -> None:
    if not fits:
        raise KernelError(f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}: needs {wanted}")
