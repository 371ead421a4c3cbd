"""The kernels for sm_90a: what they use, and what is said when NCCL is not what they need. No GPU is used."""

import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from parallel.expert.native import gpu, gpu_build
from parallel.expert.native.failure import NativeError


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels for sm_90a, compiled once; skipped aloud where nvcc is not there and cannot be fetched."""
    before = installed()
    try:
        built = gpu_build.gpu_library()
    except NativeError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(str(error))
    assert installed() == before
    return built


def installed() -> set[str]:
    """What a build must leave alone: torch, NCCL and every other package of this environment."""
    return {f"{found.name}=={found.version}" for found in metadata.distributions()}


def fake_nccl(folder: Path, version: int, *, whole: bool = True) -> str:
    """A library that says it is this NCCL."""
    names = [
        "GetUniqueId",
        "CommInitRank",
        "CommDestroy",
        "MemAlloc",
        "MemFree",
        "CommWindowRegister",
        "CommWindowDeregister",
    ]
    names += ["DevCommCreate", "DevCommDestroy"] if whole else []
    lines = [f"int nccl{name}() {{ return 0; }}" for name in names]
    source = folder / "fake.c"
    source.write_text("\n".join([*lines, f"int ncclGetVersion(int* v) {{ *v = {version}; return 0; }}"]))
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", folder / "libnccl.so.2"], check=True)
    return str(folder / "libnccl.so.2")


@pytest.mark.slow
def test_no_spills_no_stack_registers_within_budget(library: Path) -> None:
    found = {row.kernel: row for row in gpu_build.usage(library)}
    assert set(found) == set(gpu_build.KERNELS)
    assert not [text for row in found.values() for text in row.problems]
    # A register that spills goes to the stack, in local memory; ptxas gives the kernels room below their budget.
    assert all(0 < row.registers <= row.budget and row.stack_bytes == row.local_bytes == 0 for row in found.values())


@pytest.mark.slow
def test_the_limits_catch_a_kernel_that_spills(tmp_path: Path, library: Path) -> None:
    """Two blocks of 1,024 threads an SM leave 32 registers a thread: ptxas has to spill, and the table shows it."""
    source, built = tmp_path / "spills.cu", tmp_path / "spills.so"
    lines = "".join(f"v[{i}] = p[{i} * 32 + threadIdx.x]; " for i in range(64))
    total = "".join(f"s = s * v[{i}] + v[{63 - i}]; " for i in range(64))
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(1024, 2) ep_combine_kernel(float* p) {'
        f" float v[64], s = 1; {lines} __syncthreads(); {total} p[threadIdx.x] = s; }}"
    )
    compiler = gpu_build.nvcc(library.parent)
    subprocess.run([*compiler, *gpu_build.FLAGS, source, "-o", built], check=True)
    (row,) = gpu_build.usage(built)
    assert row.registers <= 32 and row.stack_bytes > 0
    assert any("stack of " in text for text in row.problems)


@pytest.mark.exhaustive
def test_a_machine_without_cuda_compiles_with_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing: headers, nvcc and cuobjdump are fetched (400 MB) and taken apart; nothing is installed."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    before = installed()
    found = gpu_build.usage(gpu_build.gpu_library(tmp_path))
    assert {row.kernel for row in found} == set(gpu_build.KERNELS)
    assert not [text for row in found for text in row.problems] and installed() == before


@pytest.mark.slow
@pytest.mark.parametrize(("version", "whole", "words"), [
    (22907, True, r"NCCL 2\.30\.4 \(23004\) or newer is needed, this one is 22907"),
    (22804, False, r"this NCCL is older than 2\.30\.4: it has no ncclDevComm"),
])  # fmt: skip
def test_an_old_nccl_is_refused(tmp_path: Path, library: Path, version: int, whole: bool, words: str) -> None:
    opened = gpu.GpuLibrary(library, fake_nccl(tmp_path, version, whole=whole))
    with pytest.raises(NativeError, match=words):
        opened.unique_id()


@pytest.mark.slow
def test_a_missing_nccl_is_refused(library: Path) -> None:
    with pytest.raises(NativeError, match=r"NCCL cannot be loaded: libnowhere\.so"):
        gpu.GpuLibrary(library, "libnowhere.so").unique_id()


@pytest.mark.slow
def test_a_new_nccl_is_taken(tmp_path: Path, library: Path) -> None:
    assert len(gpu.GpuLibrary(library, fake_nccl(tmp_path, 23203)).unique_id()) == 128


@pytest.mark.parametrize("num_sms", [0, 132, 200])
def test_some_sms_must_be_left(num_sms: int) -> None:
    with pytest.raises(NativeError, match=f"num_sms={num_sms}: from 1 to 131, this GPU has 132"):
        gpu._check_sms(num_sms, 132)


def test_wheels_that_cannot_be_fetched_are_named(tmp_path: Path) -> None:
    with pytest.raises(NativeError, match=r"^./nowhere.whl cannot be fetched: ") as caught:
        gpu_build.fetched(("./nowhere.whl",), "bin/", tmp_path)
    assert "\n" not in str(caught.value)


def test_limits_are_found() -> None:
    row = gpu_build.Usage("ep_combine_kernel", registers=169, stack_bytes=8, local_bytes=0, shared_bytes=0)
    assert row.budget == 168
    assert row.problems == ["ep_combine_kernel: 169 registers, 168 allowed", "ep_combine_kernel: stack of 8 bytes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_native_without_a_gpu_is_refused() -> None:
    from parallel.expert.native.dispatcher import NativeConfig

    sizes = {"num_nodes": 1, "num_experts": 2, "hidden_size": 8, "top_k": 1}
    with pytest.raises(NativeError, match="native needs CUDA GPUs; native_host runs the same kernels on a CPU"):
        gpu.NativeGpuDispatcher(None, config=NativeConfig(), **sizes)  # type: ignore[arg-type]
