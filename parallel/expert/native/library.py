"""The host library: built by g++ on first use, kept by the hash of its source, bound by ctypes."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from parallel.expert.native.failure import Failure, NativeError

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-std=c++17", "-O3", "-pthread", "-fPIC", "-shared")
BYTES, BF16, FP32 = range(3)  # ep::Format
COUNTERS = (
    "dispatch_rail_tokens", "dispatch_rail_bytes", "dispatch_nvl_tokens",
    "combine_rail_tokens", "combine_rail_bytes", "combine_nvl_tokens", "notify_rail_bytes",
)  # fmt: skip


class Shape(Structure):
    """ep::Shape: what all ranks agree on."""

    _fields_ = [
        (name, c_int32) for name in ("nodes", "locals", "channels", "ring", "chunk", "top_k", "experts", "row_bytes")
    ]


class Options(Structure):
    """EpOptions."""

    _fields_ = [(name, c_uint64) for name in ("patience_ns", "seed", "dead_after", "num_sms")]


class Transfer(Structure):
    """EpTransfer: the memory of one routing."""

    _fields_ = [
        ("tokens", c_int32), ("top_k", c_int32), ("forwarded", c_int32), ("fixed", c_void_p), ("lists", c_void_p),
    ]  # fmt: skip


SIGNATURES = {
    "ep_window_bytes": (c_size_t, [POINTER(Shape)]),
    "ep_routing_ints": (c_size_t, [POINTER(Shape), c_int, c_int]),
    "ep_totals_at": (c_size_t, [POINTER(Shape), c_int, c_int]),
    "ep_close": (None, [c_void_p]),
    "ep_stop": (None, [c_void_p]),
    "ep_failure": (None, [c_void_p, POINTER(c_int64)]),
    "ep_counters": (None, [c_void_p, POINTER(c_uint64)]),
    "ep_notify": (c_int, [c_void_p, POINTER(Transfer), c_void_p, c_int, c_int]),
    "ep_dispatch": (c_int, [c_void_p, POINTER(Transfer), c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int]),
    "ep_combine": (c_int, [c_void_p, POINTER(Transfer), c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int]),
}


def cache_folder() -> Path:
    """Where built libraries and fetched headers are kept."""
    return Path.home() / ".cache" / "expertpipe" / "native"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The cache folder for one process at a time, made if it is not there. The lock goes with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def host_library(folder: Path | None = None) -> Path:
    """Path of the host library, built if it is not there; ranks that start together build it once.

    Raises NativeError if g++ is missing or fails.
    """
    folder = folder or cache_folder()
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    target = folder / f"host-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise NativeError(
            "dispatcher native_host needs g++ to build its library: install g++ (C++17) or use collective"
        )
    with locked(folder):
        if not target.exists():
            built = target.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, str(SOURCES / "abi_host.cpp"), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise NativeError(f"g++ failed on the native_host library: {first}")
            built.replace(target)
    return target


def bind(path: Path) -> ctypes.CDLL:
    """A library with the signatures that the one for CPUs and the one for GPUs share; see also `bind_host`."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def bind_host() -> ctypes.CDLL:
    """The host library, built if need be."""
    library = bind(host_library())
    library.ep_open.restype = c_void_p
    library.ep_open.argtypes = [POINTER(Shape), c_int, c_void_p, POINTER(Options)]
    return library


@dataclass(frozen=True)
class Machine:
    """One rank of an opened library. Its transfers return only when they are over; one at a time."""

    library: ctypes.CDLL
    handle: int
    shape: Shape

    def routing_ints(self, tokens: int, top_k: int) -> int:
        """int32 words of the fixed part of a routing."""
        return self.library.ep_routing_ints(self.shape, tokens, top_k)

    def totals_at(self, tokens: int, top_k: int) -> int:
        """Where in it the totals are: rows, forwarded tokens, arrived tokens, rows of each local expert."""
        return self.library.ep_totals_at(self.shape, tokens, top_k)

    def failure(self) -> Failure:
        """Why a transfer did not return 0."""
        words = (c_int64 * 8)()
        self.library.ep_failure(self.handle, words)
        return Failure(*words)

    def counters(self) -> dict[str, int]:
        """What this rank has sent since it was opened: tokens and bytes to other nodes, tokens over NVLink."""
        words = (c_uint64 * len(COUNTERS))()
        self.library.ep_counters(self.handle, words)
        return dict(zip(COUNTERS, words, strict=True))
