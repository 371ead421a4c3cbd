"""Compiles the kernels for GPUs (sm_90a) and checks what each uses: no spills, no stack, registers within its budget.

    python -m parallel.expert.native.gpu_build

Needs a C++ compiler, no GPU. NCCL's headers, and nvcc and cuobjdump where they are not there, come from wheels that are
taken apart in the cache folder and never installed: torch and its own NCCL stay as they are.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from parallel.expert.native.failure import NativeError
from parallel.expert.native.library import SOURCES, cache_folder, locked

NCCL_WHEEL, LEAST_NCCL = "nvidia-nccl-cu13==2.32.3", (2, 30, 4)
CUOBJDUMP_WHEEL = "nvidia-cuda-cuobjdump==13.4.92"
# What nvcc needs; they all unpack to parts of one folder. 102 MB to fetch.
NVCC_WHEELS = (
    "nvidia-cuda-nvcc==13.0.88", "nvidia-nvvm==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)  # fmt: skip
FLAGS = (
    "-std=c++17",
    "-O3",
    "-gencode",
    "arch=compute_90a,code=sm_90a",
    "-Xcompiler",
    "-fPIC",
    "-shared",
    "-cudart",
    "static",
)
REGISTERS_OF_AN_SM, GRANULE = 65536, 8
# Kernel: threads of a block, as its __launch_bounds__ declare.
KERNELS = {
    "ep_layout_kernel": 384, "ep_exchange_kernel": 96, "ep_tables_kernel": 32, "ep_dispatch_kernel": 384,
    "ep_combine_kernel": 384,
}  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What cuobjdump says of a kernel: registers of a thread, bytes of stack, local and static shared memory."""

    kernel: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int

    @property
    def budget(self) -> int:
        """Registers that a thread may have when one block is on an SM."""
        return min(255, REGISTERS_OF_AN_SM // KERNELS[self.kernel] // GRANULE * GRANULE)

    @property
    def problems(self) -> list[str]:
        """What is over its limit."""
        found = [f"{self.registers} registers, {self.budget} allowed"] if self.registers > self.budget else []
        found += [f"stack of {self.stack_bytes} bytes"] if self.stack_bytes else []
        found += [f"{self.local_bytes} bytes of local memory"] if self.local_bytes else []
        return [f"{self.kernel}: {text}" for text in found]


def nvcc(folder: Path) -> list[str]:
    """How nvcc is called: CUDA's, else the one of its wheels. Raises NativeError if they cannot be fetched."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is not None:
        return [found]
    root = fetched(NVCC_WHEELS, "nvidia/cu13/", folder) / "nvidia" / "cu13"
    for program in (*(root / "bin").glob("*"), *(root / "nvvm" / "bin").glob("*")):
        if program.is_file():
            program.chmod(0o755)
    return [str(root / "bin" / "nvcc"), f"-L{root / 'lib'}"]  # it looks for its libraries in lib64


def cuobjdump(folder: Path) -> str:
    """Path of cuobjdump: CUDA's, else from its own wheel."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found is not None:
        return found
    program = next(fetched((CUOBJDUMP_WHEEL,), "bin/cuobjdump", folder).rglob("cuobjdump"))
    program.chmod(0o755)
    return str(program)


def fetched(requirements: tuple[str, ...], part: str, folder: Path) -> Path:
    """A folder with those files of wheels whose paths contain `part`; downloaded on first use, never installed."""
    target = folder / requirements[0].replace("==", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) < len(requirements):
            raise NativeError(f"{', '.join(requirements)} cannot be fetched: {' '.join(done.stderr.split())[-200:]}")
        taken = Path(scratch) / "taken"
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(taken, [name for name in archive.namelist() if part in name])
        try:
            taken.rename(target)
        except OSError:  # another process was first
            if not target.exists():
                raise
    return target


def nccl_headers(folder: Path | None = None) -> Path:
    """NCCL's include folder, fetched as a wheel on first use. Raises NativeError if that fails or it is too old."""
    target = folder or cache_folder()
    include = fetched((NCCL_WHEEL,), "/include/", target) / "nvidia" / "nccl" / "include"
    version = header_version(include)
    if version < LEAST_NCCL:
        raise NativeError(f"NCCL {version} in {include} is older than {LEAST_NCCL}")
    return include


def header_version(include: Path) -> tuple[int, ...]:
    """NCCL's version as its header says."""
    text = (include / "nccl.h").read_text()
    found = (re.search(rf"#define NCCL_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH"))
    return tuple(int(match.group(1)) for match in found if match)


def gpu_library(folder: Path | None = None) -> Path:
    """Path of the compiled library, built if it is not there (a minute or so)."""
    folder = folder or cache_folder()
    digest = hashlib.sha256(f"{FLAGS} {NCCL_WHEEL}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    target = folder / f"sm90a-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    with locked(folder):
        if not target.exists():
            include, compiler, built = nccl_headers(folder), nvcc(folder), target.with_suffix(".part.so")
            command = [*compiler, *FLAGS, "-I", str(include), str(SOURCES / "abi_gpu.cu"), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise NativeError(f"nvcc failed on the native library: {first}")
            built.replace(target)
    return target


def usage(library: Path) -> list[Usage]:
    """What each kernel of the library uses."""
    text = subprocess.run(
        [cuobjdump(library.parent), "-res-usage", library], check=True, capture_output=True, text=True
    ).stdout
    pattern = r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        Usage(name, int(registers), int(stack), int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(pattern, text)
    ]


def main() -> int:
    """Prints the table; 1 if a kernel is over a limit or missing."""
    found = usage(gpu_library())
    print(f"{'kernel':<22}{'threads':>8}{'registers':>10}{'allowed':>8}{'stack':>6}{'local':>6}{'shared':>7}")
    for row in found:
        sizes = f"{row.stack_bytes:>6}{row.local_bytes:>6}{row.shared_bytes:>7}"
        print(f"{row.kernel:<22}{KERNELS[row.kernel]:>8}{row.registers:>10}{row.budget:>8}{sizes}")
    problems = [text for row in found for text in row.problems]
    problems += [f"{name} is missing" for name in KERNELS if name not in {row.kernel for row in found}]
    print("\n".join(problems) or "no spills, no stack, registers within budget")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
