"""Kernels in C++ for this machine's processor: built by g++ when first asked for, kept in the user's cache folder.

A library's name is made of its sources, the flags and the processor, so that processes can race for it and a home
folder can be shared by machines of several kinds. A build takes some seconds.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

# Without contraction and with IEEE division: what is computed does not depend on what the compiler finds to fuse.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"),
)
BF16_HEADER = Path(__file__).parent / "rowwise" / "csrc" / "bf16.h"


class MissingCompiler(ValueError):
    """Compiled kernels were asked for and cannot be built."""

    user_error = True


def build(name: str, source: Path, *, headers: Sequence[Path] = (), instead: str, folder: Path | None = None) -> Path:
    """The path of the shared library `name` of one source file, compiled if it is not there yet.

    headers: of ours that the source includes. instead: what to configure where there is no compiler, for the message
    of MissingCompiler. folder: where to keep it (~/.cache/expertpipe).
    """
    folder, files = folder or Path.home() / ".cache" / "expertpipe", (source, BF16_HEADER, *headers)
    text = b"".join(file.read_bytes() for file in files) + " ".join((*FLAGS, _processor())).encode()
    library = folder / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if library.exists():
        return library
    includes = sorted({f"-I{file.parent}" for file in files})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / library.name
            command = ["g++", *FLAGS, *includes, str(source), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(fresh, library)  # atomic: another process sees all of it or nothing
    except subprocess.CalledProcessError as error:
        first = error.stderr.strip().splitlines()[0]
        raise MissingCompiler(f"g++ could not compile the {name} kernels: {first}; {instead} needs none") from None
    except OSError as error:
        raise MissingCompiler(
            f"the {name} kernels need g++ and a writable {folder} ({error}); {instead} needs neither"
        ) from None
    return library


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """The data of a tensor as a kernel takes it; None is the null pointer."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
