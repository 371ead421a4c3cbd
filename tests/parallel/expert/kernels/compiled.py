"""Compiles every kernel for sm_90a and prints what it needs, as JSON lines; run by test_triton.py. No GPU is used."""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

# pyright: reportMissingImports=false, reportIndexIssue=false
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from parallel.expert.kernels import triton_rows as kernels

FLOOR = 0x38D1B717  # the bits of 1e-4
CASES = {
    "gather": (kernels.gather_kernel, "*i32 *i64 *i32 i32", {"BLOCK": 1024}),
    "quantise_bf16": (kernels.quantise_kernel, "*u16 *u8 *u8 i32 i32", {"IS_BF16": True, "FLOOR": FLOOR, "TILES": 8}),
    "quantise_fp32": (kernels.quantise_kernel, "*fp32 *u8 *u8 i32 i32", {"IS_BF16": False, "FLOOR": 0, "TILES": 8}),
    "dequantise_bf16": (kernels.dequantise_kernel, "*u8 *u8 *u16 i32 i32", {"TO_BF16": True, "TILES": 8}),
    "dequantise_fp32": (kernels.dequantise_kernel, "*u8 *u8 *fp32 i32 i32", {"TO_BF16": False, "TILES": 8}),
    "combine": (kernels.combine_kernel, "*u16 *i64 *i64 *u16 i32", {"TOP_K": 8, "HAS_WEIGHTS": False, "BLOCK": 1024}),
    "combine_weighted": (
        kernels.combine_kernel, "*u16 *i64 *fp32 *u16 i32", {"TOP_K": 8, "HAS_WEIGHTS": True, "BLOCK": 1024}
    ),
}  # fmt: skip
CUOBJDUMP = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    for name, (kernel, types, constants) in CASES.items():
        names = [n for n in kernel.arg_names if n not in constants]
        signature = {**dict(zip(names, types.split(), strict=True)), **dict.fromkeys(constants, "constexpr")}
        # what the launcher finds out at run time: pointers and widths that 16 divides
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = triton.compile(
                ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": 4, "enable_fp_fusion": False},
            )
        found = {
            key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage(built.asm["cubin"]))
        }
        target = re.search(r"\.target (\S+?),?\s", built.asm["ptx"])
        vectors = len(re.findall(r"ld\.global\S*\.v4|st\.global\S*\.v4", built.asm["ptx"]))
        fused = len(re.findall(r"fma\.", built.asm["ptx"]))
        print(json.dumps({"kernel": name, "target": target and target[1], "v4": vectors, "fma": fused, **found}))


if __name__ == "__main__":
    sys.exit(main())
