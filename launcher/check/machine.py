"""What this machine has for a run, looked up without torch: GPUs, the CUDA of the torch installed here, compilers."""

import re
import runpy
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path


def torch_cuda() -> str | None:
    """The version of CUDA that the installed torch was built with, such as "12.9"; None without torch or CUDA.

    torch writes it into a small file of its own, which is read without the rest.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]


def gpu_capabilities() -> tuple[str, ...]:
    """The compute capability of each GPU here, such as "9.0", from nvidia-smi; () without it, or where it fails.

    torch would take hold of a GPU to tell, in a process that may only look.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(re.findall(r"^\s*(\d+\.\d+)\s*$", said, re.MULTILINE))


def can_compile(name: str) -> bool:
    """Whether the kernels `name` of `model.compiled` can be had here: there is g++, or an earlier build is kept.

    A kept build may be of other sources or another processor; then the first process that needs it says so.
    """
    return shutil.which("g++") is not None or any((Path.home() / ".cache" / "expertpipe").glob(f"{name}-*.so"))
