"""What this machine has for a run, looked up without torch: the CUDA of the torch installed here, its compilers."""

import runpy
import shutil
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


def can_compile(name: str) -> bool:
    """Whether the kernels `name` of `model.compiled` can be had here: there is g++, or an earlier build is kept.

    A kept build may be of other sources or another processor; then the first process that needs it says so.
    """
    return shutil.which("g++") is not None or any((Path.home() / ".cache" / "expertpipe").glob(f"{name}-*.so"))
