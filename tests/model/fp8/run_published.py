"""Runs the released FP8 kernels from their own source on a file: python run_published.py KERNEL.py IN.npz OUT.npz

Triton is replaced by a small interpreter over NumPy whose one cast to E4M3 is ml_dtypes' (Triton's own interpreter
rounds it wrongly), so the source is executed as written, one program after another, and needs no GPU. `dot` is the sum
of exact products, rounded to FP32 once: what a tensor core drops of it is no part of the source.

IN `x`: act_quant in both formats of scales. IN `a_values`, `a_scales`, `b_values`, `b_scales`: fp8_gemm of both, and
weight_dequant of b, in FP32 and in BF16.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

# Torch's dtypes without one in NumPy: the integers of their size, and ml_dtypes' for these.
FOREIGN = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
}


class Pointer:
    def __init__(self, memory: np.ndarray, offset: Any = 0) -> None:
        self.memory, self.offset, self.dtype = memory, offset, types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)


class Value(np.ndarray):
    """An array with Triton's `.to`."""

    def to(self, dtype: Any) -> "Value":
        return np.asarray(self).astype(dtype).view(Value)


class Language(types.ModuleType):
    constexpr, float32 = int, np.float32

    def __init__(self) -> None:
        super().__init__("triton.language")
        self.pids: tuple[int, ...] = (0,)
        self.math = types.SimpleNamespace(ceil=np.ceil, log2=np.log2, exp2=np.exp2)

    def program_id(self, axis: int) -> int:
        return self.pids[axis]

    def arange(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Value:
        return np.zeros(shape, dtype).view(Value)

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0.0) -> Value:
        if mask is None:
            return np.asarray(pointer.memory[pointer.offset]).view(Value)
        offset, mask = np.broadcast_arrays(pointer.offset, mask)
        found = np.full(offset.shape, other).astype(pointer.memory.dtype)
        found[mask] = pointer.memory[offset[mask]]
        return found.view(Value)

    def store(self, pointer: Pointer, value: Any, mask: Any = True) -> None:
        offset, values, mask = np.broadcast_arrays(pointer.offset, np.asarray(value), mask)
        pointer.memory[offset[mask]] = values[mask].astype(pointer.memory.dtype)

    def dot(self, a: Any, b: Any) -> Value:
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32).view(Value)

    def max(self, x: Any) -> Any:
        return np.float32(x.max())

    def abs(self, x: Any) -> Any:
        return np.abs(x)

    def maximum(self, x: Any, y: Any) -> Any:
        return np.maximum(np.float32(x), np.float32(y))


def memory_of(argument: Any) -> Any:
    """A tensor's memory, flat, as a pointer; anything else as it is."""
    if not isinstance(argument, torch.Tensor):
        return argument
    integers, dtype = FOREIGN.get(argument.dtype, (argument.dtype, None))
    array = argument.view(integers).numpy().reshape(-1)
    return Pointer(array if dtype is None else array.view(dtype))


def modules() -> None:
    triton, language = types.ModuleType("triton"), Language()

    class Kernel:
        def __init__(self, body: Callable[..., None], constants: dict[str, int] | None = None) -> None:
            self.body, self.constants = body, constants or {}

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*arguments: Any, **given: Any) -> None:
                constants, pointers = self.constants | given, [memory_of(argument) for argument in arguments]
                for language.pids in np.ndindex(grid(constants)):
                    self.body(*pointers, **constants)

            return launch

    def autotune(*, configs: list[dict[str, int]], key: Any) -> Callable[[Kernel], Kernel]:
        return lambda kernel: Kernel(kernel.body, configs[0])

    triton.__dict__.update(
        jit=Kernel, autotune=autotune, cdiv=language.cdiv, Config=lambda constants, **_: constants, language=language
    )
    sys.modules.update({"triton": triton, "triton.language": language})


def quantised(published: Any, x: torch.Tensor) -> dict[str, np.ndarray]:
    found = {}
    for name, scale_fmt in (("fp32", None), ("power_of_two", "ue8m0")):
        values, scales = published.act_quant(x, scale_fmt=scale_fmt)
        found |= {f"{name}_values": values.view(torch.uint8).numpy(), f"{name}_scales": scales.numpy()}
    return found


def multiplied(published: Any, given: Any) -> dict[str, np.ndarray]:
    a, b = (torch.from_numpy(given[f"{side}_values"]).view(torch.float8_e4m3fn) for side in "ab")
    a_scales, b_scales = (torch.from_numpy(given[f"{side}_scales"]) for side in "ab")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)  # of the results, in the released code
        product, weight = published.fp8_gemm(a, a_scales, b, b_scales), published.weight_dequant(b, b_scales)
        found |= {f"product_{dtype}": product.float().numpy(), f"weight_{dtype}": weight.float().numpy()}
    return found


def main(source: str, inputs: str, outputs: str) -> None:
    modules()
    spec = importlib.util.spec_from_file_location("published", source)
    assert spec is not None and spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    given, found = np.load(inputs), {}
    if "x" in given:
        found |= quantised(published, torch.from_numpy(given["x"]).view(torch.bfloat16))
    if "a_values" in given:
        found |= multiplied(published, given)
    np.savez(outputs, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
