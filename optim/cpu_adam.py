"""DeepSpeed's CPU Adam: its own build, in a folder of ours, by one process at a time.

DeepSpeed compiles the kernel when it is first used, a minute or two, in the folder of all torch extensions, where a
build that was killed leaves a lock on which every later process waits without a word. Here the build runs once for a
machine in a process of its own, in a folder named by versions and processor, under a lock that goes with its holder;
what an earlier one left there is removed. Its ranks then load a finished library and never import DeepSpeed.
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from optim.missing import MissingKernel

NAME = "cpu_adam"  # of the extension module, compiled into it
BUILD_SECONDS = 900
INSTEAD = "use optim.adamw=torch_fused"
PROGRAM = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"


def load_cpu_adam(folder: Path | None = None) -> Any:
    """The extension module, built if it is not there yet. MissingKernel in one line where it does not build."""
    library = build_cpu_adam(folder)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise MissingKernel(f"optim.adamw=deepspeed_cpu: {library} does not load ({error}): {INSTEAD}") from None
    return module


def build_cpu_adam(folder: Path | None = None) -> Path:
    """Path of the library. folder: where builds are kept (~/.cache/expertpipe/cpu_adam)."""
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        raise MissingKernel(
            f"optim.adamw=deepspeed_cpu: DeepSpeed is not installed: pip install -e .[deepspeed], or {INSTEAD}"
        ) from None
    here = (folder or Path.home() / ".cache" / "expertpipe" / "cpu_adam") / _key(installed)
    library = here / NAME / f"{NAME}.so"
    done = here / "done"  # the linker's output is there before it is whole
    if done.exists():
        return library
    path = _tools()
    here.mkdir(parents=True, exist_ok=True)
    with open(here / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(here / NAME, ignore_errors=True)  # with the lock file of a build that was killed
            _compile(here, path)
            done.touch()
    return library


def _compile(here: Path, path: str) -> None:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(here), "PATH": path}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    try:
        found = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise MissingKernel(
            f"optim.adamw=deepspeed_cpu: its build took more than {BUILD_SECONDS} s: {INSTEAD}"
        ) from None
    if found.returncode:
        said = [line for line in (found.stderr + found.stdout).splitlines() if "error" in line.lower()]
        reason = (said or found.stderr.strip().splitlines() or ["no message"])[0].strip()[:300]
        raise MissingKernel(f"optim.adamw=deepspeed_cpu does not build here ({reason}): {INSTEAD}")


def _tools() -> str:
    """PATH on which g++ and ninja are found: ninja's wheel puts it beside the interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=path) is None]
    if missing:
        raise MissingKernel(
            f"optim.adamw=deepspeed_cpu is compiled at first use and there is no {' and no '.join(missing)}: "
            f"install it, or {INSTEAD}"
        )
    return path


def _key(installed: str) -> str:
    """Versions and processor: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = sorted({line for line in lines if line.startswith(("flags", "Features", "CPU part"))})
    parts = [installed, torch.__version__, sys.version, *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
