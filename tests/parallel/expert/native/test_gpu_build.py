"""The kernels for sm_90a: what they use, and what is said when NCCL is not what they need. No GPU is used."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from parallel.expert.native import gpu, gpu_build
from parallel.expert.native.failure import NativeError

needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")), reason="nvcc is not on this machine"
)


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
@needs_nvcc
def test_no_spills_no_stack_registers_within_budget() -> None:
    before = torch.__version__, torch.__file__
    found = {row.kernel: row for row in gpu_build.usage(gpu_build.gpu_library())}
    assert set(found) == set(gpu_build.KERNELS)
    assert not [text for row in found.values() for text in row.problems]
    assert (torch.__version__, torch.__file__) == before


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(("version", "whole", "words"), [
    (22907, True, r"NCCL 2\.30\.4 \(23004\) or newer is needed, this one is 22907"),
    (22804, False, r"this NCCL is older than 2\.30\.4: it has no ncclDevComm"),
])  # fmt: skip
def test_an_old_nccl_is_refused(tmp_path: Path, version: int, whole: bool, words: str) -> None:
    library = gpu.GpuLibrary(gpu_build.gpu_library(), fake_nccl(tmp_path, version, whole=whole))
    with pytest.raises(NativeError, match=words):
        library.unique_id()


@pytest.mark.slow
@needs_nvcc
def test_a_missing_nccl_is_refused() -> None:
    with pytest.raises(NativeError, match=r"NCCL cannot be loaded: libnowhere\.so"):
        gpu.GpuLibrary(gpu_build.gpu_library(), "libnowhere.so").unique_id()


@pytest.mark.slow
@needs_nvcc
def test_a_new_nccl_is_taken(tmp_path: Path) -> None:
    assert len(gpu.GpuLibrary(gpu_build.gpu_library(), fake_nccl(tmp_path, 23203)).unique_id()) == 128


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
