"""Runs the released act_quant from its own source on a file of inputs: python run_published.py KERNEL.py IN.npz OUT.npz

Triton is replaced by a small interpreter over NumPy whose one cast to E4M3 is ml_dtypes' (Triton's own interpreter
rounds it wrongly), so the source is executed as written, one program after another, and needs no GPU.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch


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
        self.pid = 0
        self.math = types.SimpleNamespace(ceil=np.ceil, log2=np.log2, exp2=np.exp2)

    def program_id(self, axis: int) -> int:
        return self.pid

    def arange(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def load(self, pointer: Pointer) -> Value:
        return pointer.memory[pointer.offset].view(Value)

    def store(self, pointer: Pointer, value: Any) -> None:
        pointer.memory[pointer.offset] = value

    def max(self, x: Any) -> Any:
        return np.float32(x.max())

    def abs(self, x: Any) -> Any:
        return np.abs(x)

    def maximum(self, x: Any, y: Any) -> Any:
        return np.maximum(np.float32(x), np.float32(y))


def modules() -> Language:
    triton, language = types.ModuleType("triton"), Language()

    class Kernel:
        def __init__(self, body: Callable[..., None]) -> None:
            self.body = body

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor, **constants: Any) -> None:
                arrays = [x.view(torch.int16).numpy().view(ml_dtypes.bfloat16), np.zeros(0), s.numpy().reshape(-1)]
                arrays[1] = y.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
                pointers = [Pointer(array.reshape(-1)) for array in arrays]
                for language.pid in range(grid({"BLOCK_SIZE": constants["BLOCK_SIZE"]})[0]):
                    self.body(*pointers, **constants)

            return launch

    triton.__dict__.update(
        jit=Kernel, autotune=lambda **_: lambda kernel: kernel, cdiv=lambda a, b: -(-a // b),
        Config=lambda *args, **kwargs: None, language=language,
    )  # fmt: skip
    sys.modules.update({"triton": triton, "triton.language": language})
    return language


def main(source: str, inputs: str, outputs: str) -> None:
    modules()
    spec = importlib.util.spec_from_file_location("published", source)
    assert spec is not None and spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    x = torch.from_numpy(np.load(inputs)["x"]).view(torch.bfloat16)
    found = {}
    for name, scale_fmt in (("fp32", None), ("power_of_two", "ue8m0")):
        values, scales = published.act_quant(x, scale_fmt=scale_fmt)
        found |= {f"{name}_values": values.view(torch.uint8).numpy(), f"{name}_scales": scales.numpy()}
    np.savez(outputs, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
