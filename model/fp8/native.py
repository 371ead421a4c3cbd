"""The quantisers as compiled code (csrc/quantise.cpp): one pass through the cache where plain torch makes ten.

Built when first asked for, see `model/compiled.py`.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from model.compiled import address, build
from model.fp8.formats import Layout, QuantisedTensor, Rows, Scales, Tile, scale_shape
from model.fp8.quantise import Encoded, Request, wide_dtype

SOURCE = Path(__file__).parent / "csrc" / "quantise.cpp"
HEADER = Path(__file__).parent / "csrc" / "formats.h"


def build_kernels(folder: Path | None = None) -> Path:
    """The library's path, see `model.compiled.build`."""
    return build("fp8", SOURCE, headers=[HEADER], instead="fp8.native=false", folder=folder)


def _bounds(rows: Rows) -> Tensor:
    return torch.tensor(rows.bounds, dtype=torch.int64)


class _Place:
    """Where BF16 numbers are written: the tensor, each block's first row in it, and its stride if transposed."""

    def __init__(self, rows: Rows, num_columns: int, layout: Layout) -> None:
        plain, turned = layout is Layout.PLAIN, layout is Layout.TURNED
        num_rows = rows.num_rows if plain else rows.padded_starts[-1]
        shape = (num_columns, num_rows) if turned else (num_rows, num_columns)
        self.tensor = torch.empty(shape, dtype=torch.bfloat16)
        self.blocks = torch.tensor(rows.bounds[:-1] if plain else rows.padded_blocks, dtype=torch.int64)
        self.stride = num_rows if turned else 0
        if not plain:
            for start, stop, count in zip(rows.padded_starts, rows.padded_starts[1:], rows.counts, strict=False):
                gap = slice(start + count, stop)
                (self.tensor[:, gap] if turned else self.tensor[gap]).zero_()


class NativeKernels:
    """The same bits as TorchKernels, on CPU tensors, on the calling thread."""

    def __init__(self, library: Path | None = None) -> None:
        self._library = ctypes.CDLL(str(library or build_kernels()))

    def encode(self, x: Tensor, rows: Rows, request: Request) -> Encoded:
        """See quantise.Kernels."""
        x = _on_cpu(x)
        if x.stride(1) != 1:
            x = x.contiguous()
        num_columns, power = x.shape[1], request.scales is Scales.POWER_OF_TWO
        values = torch.empty(x.shape, dtype=torch.float8_e4m3fn) if request.values else None
        place = _Place(rows, num_columns, request.layout) if request.wide else None
        wide = None if place is None else place.tensor
        shape = scale_shape(request.tile, rows, num_columns)
        scales = torch.empty(shape, dtype=torch.uint8 if power else torch.float32)
        bounds = _bounds(rows)
        self._library.fp8_quantise(
            *(address(x), int(x.dtype == torch.float32), ctypes.c_long(num_columns), ctypes.c_long(x.stride(0))),
            *(address(bounds), ctypes.c_long(rows.num_blocks), *request.tile.value, int(power)),
            *(ctypes.c_float(request.amax_floor), address(values), address(wide), address(scales)),
            *(address(None if place is None else place.blocks), ctypes.c_long(0 if place is None else place.stride)),
        )
        return Encoded(values, wide, scales)

    def recode(self, tensor: QuantisedTensor, request: Request) -> Encoded:
        """See quantise.Kernels."""
        fused = tensor.power_of_two and request.scales is Scales.POWER_OF_TWO and not request.values
        if not (fused and tensor.tile is Tile.ROW and request.tile is Tile.COLUMN):
            return self.encode(self.decode(tensor, wide_dtype(tensor)), tensor.rows, request)
        values, rows, num_columns = _on_cpu(tensor.values).contiguous(), tensor.rows, tensor.values.shape[1]
        place = _Place(rows, num_columns, request.layout)
        scales = torch.empty(scale_shape(Tile.COLUMN, rows, num_columns), dtype=torch.uint8)
        bounds, exponents = _bounds(rows), tensor.scales.contiguous()
        self._library.fp8_requantise(
            *(address(values), address(exponents), ctypes.c_long(num_columns), address(bounds)),
            *(ctypes.c_long(rows.num_blocks), ctypes.c_float(request.amax_floor), address(place.tensor)),
            *(address(scales), address(place.blocks), ctypes.c_long(place.stride)),
        )
        return Encoded(None, place.tensor, scales)

    def decode(self, tensor: QuantisedTensor, dtype: torch.dtype) -> Tensor:
        """See quantise.Kernels."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"the native kernels dequantise to bfloat16 or float32, not {dtype}")
        values, scales = _on_cpu(tensor.values).contiguous(), tensor.scales.contiguous()
        out = torch.empty(values.shape, dtype=dtype)
        bounds = _bounds(tensor.rows)
        self._library.fp8_dequantise(
            *(address(values), address(scales), ctypes.c_long(values.shape[1]), address(bounds)),
            *(ctypes.c_long(tensor.rows.num_blocks), *tensor.tile.value, int(tensor.power_of_two)),
            *(int(dtype == torch.float32), address(out)),
        )
        return out

    def amax_of_part(self, part: Tensor, start: int, rows: Rows, num_columns: int) -> Tensor:
        """See quantise.Kernels."""
        part, bounds = _flat_fp32(part), _bounds(rows)
        amax = torch.zeros(scale_shape(Tile.BLOCK, rows, num_columns))
        self._library.fp8_amax_of_part(
            *(address(part), ctypes.c_long(start), ctypes.c_long(len(part)), ctypes.c_long(num_columns)),
            *(address(bounds), ctypes.c_long(rows.num_blocks), address(amax)),
        )
        return amax

    def encode_part(self, part: Tensor, start: int, rows: Rows, num_columns: int, scales: Tensor) -> Tensor:
        """See quantise.Kernels."""
        part, bounds, scales = _flat_fp32(part), _bounds(rows), _on_cpu(scales).contiguous()
        values = torch.empty(part.shape, dtype=torch.float8_e4m3fn)
        self._library.fp8_encode_part(
            *(address(part), ctypes.c_long(start), ctypes.c_long(len(part)), ctypes.c_long(num_columns)),
            *(address(bounds), ctypes.c_long(rows.num_blocks), address(scales), int(scales.dtype == torch.uint8)),
            address(values),
        )
        return values

    def encode_e5m6(self, x: Tensor, high: Tensor, low: Tensor, exponents: Tensor, *, amax_floor: float) -> None:
        """See e5m6.quantise_e5m6: fills high, low and exponents from x [rows, columns]."""
        x = _on_cpu(x)
        x = x if x.stride(1) == 1 else x.contiguous()
        self._library.e5m6_quantise(
            *(address(x), int(x.dtype == torch.float32), *(ctypes.c_long(n) for n in (*x.shape, x.stride(0)))),
            *(ctypes.c_float(amax_floor), address(high), address(low), address(exponents)),
        )

    def decode_e5m6(self, high: Tensor, low: Tensor, exponents: Tensor) -> Tensor:
        """See e5m6.E5M6Tensor.dequantise: BF16 [rows, columns]."""
        out = torch.empty(high.shape, dtype=torch.bfloat16)
        self._library.e5m6_dequantise(
            *(address(part) for part in (high, low, exponents)), *(ctypes.c_long(n) for n in high.shape), address(out)
        )
        return out


def _flat_fp32(part: Tensor) -> Tensor:
    if part.dtype != torch.float32 or part.dim() != 1:
        raise TypeError(f"a part of a weight is flat and float32, not {part.dtype} of {part.dim()} dimensions")
    return _on_cpu(part).contiguous()


def _on_cpu(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        raise ValueError(f"the native FP8 kernels take CPU tensors, not {x.device}")
    return x
