"""The quantisers as compiled code (csrc/quantise.cpp): one pass through the cache where plain torch makes ten.

The library is built by g++ for this machine's processor when it is first asked for, about four seconds, and kept in the
user's cache folder under a name made of the source, the flags and the processor, so that processes can race for it.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from model.fp8.formats import Layout, QuantisedTensor, Rows, Scales, Tile, scale_shape
from model.fp8.quantise import Encoded, Request, wide_dtype

SOURCE = Path(__file__).parent / "csrc" / "quantise.cpp"
HEADER = Path(__file__).parent / "csrc" / "formats.h"
# Without contraction and with IEEE division, so that every bit is that of plain torch.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"),
)


class MissingCompiler(ValueError):
    """The native kernels were asked for and cannot be built."""

    user_error = True


def build(folder: Path | None = None) -> Path:
    """The library's path, compiled if it is not there yet. folder: where to keep it (~/.cache/expertpipe)."""
    folder = folder or Path.home() / ".cache" / "expertpipe"
    key = hashlib.sha256(
        SOURCE.read_bytes() + HEADER.read_bytes() + " ".join((*FLAGS, _processor())).encode()
    ).hexdigest()[:16]
    library = folder / f"fp8-{key}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / library.name
            command = ["g++", *FLAGS, f"-I{HEADER.parent}", str(SOURCE), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(fresh, library)  # atomic: another process sees all of it or nothing
    except subprocess.CalledProcessError as error:
        raise MissingCompiler(
            f"g++ could not compile the FP8 kernels: {error.stderr.strip().splitlines()[0]}"
        ) from None
    except OSError as error:
        raise MissingCompiler(
            f"the native FP8 kernels need g++ and a writable {folder} ({error}); fp8.native=false needs neither"
        ) from None
    return library


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


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
        self._library = ctypes.CDLL(str(library or build()))

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
            *(_address(x), int(x.dtype == torch.float32), ctypes.c_long(num_columns), ctypes.c_long(x.stride(0))),
            *(_address(bounds), ctypes.c_long(rows.num_blocks), *request.tile.value, int(power)),
            *(ctypes.c_float(request.amax_floor), _address(values), _address(wide), _address(scales)),
            *(_address(None if place is None else place.blocks), ctypes.c_long(0 if place is None else place.stride)),
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
            *(_address(values), _address(exponents), ctypes.c_long(num_columns), _address(bounds)),
            *(ctypes.c_long(rows.num_blocks), ctypes.c_float(request.amax_floor), _address(place.tensor)),
            *(_address(scales), _address(place.blocks), ctypes.c_long(place.stride)),
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
            *(_address(values), _address(scales), ctypes.c_long(values.shape[1]), _address(bounds)),
            *(ctypes.c_long(tensor.rows.num_blocks), *tensor.tile.value, int(tensor.power_of_two)),
            *(int(dtype == torch.float32), _address(out)),
        )
        return out

    def encode_e5m6(self, x: Tensor, high: Tensor, low: Tensor, exponents: Tensor, *, amax_floor: float) -> None:
        """See e5m6.quantise_e5m6: fills high, low and exponents from x [rows, columns]."""
        x = _on_cpu(x)
        x = x if x.stride(1) == 1 else x.contiguous()
        self._library.e5m6_quantise(
            *(_address(x), int(x.dtype == torch.float32), *(ctypes.c_long(n) for n in (*x.shape, x.stride(0)))),
            *(ctypes.c_float(amax_floor), _address(high), _address(low), _address(exponents)),
        )

    def decode_e5m6(self, high: Tensor, low: Tensor, exponents: Tensor) -> Tensor:
        """See e5m6.E5M6Tensor.dequantise: BF16 [rows, columns]."""
        out = torch.empty(high.shape, dtype=torch.bfloat16)
        self._library.e5m6_dequantise(
            *(_address(part) for part in (high, low, exponents)), *(ctypes.c_long(n) for n in high.shape), _address(out)
        )
        return out


def _on_cpu(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        raise ValueError(f"the native FP8 kernels take CPU tensors, not {x.device}")
    return x
