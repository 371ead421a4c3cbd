"""Writes safetensors files as a stream: the header first, then each tensor as it comes, hashed on the way.

safetensors' own writer wants all tensors of a file in memory and copies them into a buffer; ours needs one, and the
checksum costs no second pass over the data.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.uint8: "U8",
}
PART_BYTES = 8 << 20  # hashed and written at a time, while it is in the cache
FLUSH_BYTES = 64 << 20  # between hints to the kernel to begin with the disk


@dataclass(frozen=True)
class FileRecord:
    """Size and XXH3-128 (hexadecimal) of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_file_order(tensors: Sequence[Planned]) -> list[Planned]:
    """Widest dtypes first, else as given: every tensor then begins at a multiple of its item size."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def header_bytes(tensors: Sequence[Planned], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON header of a file that holds the tensors in file order, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in in_file_order(tensors):
        stop = start + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop],
        }  # fmt: skip
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """One new safetensors file; `put` every planned tensor, then `close`. FileExistsError where there is one.

    Tensors put in file order are hashed on the way (`record`); any other order is fine where no checksum is wanted.
    """

    def __init__(self, path: Path, tensors: Sequence[Planned], *, metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._planned = {tensor.name: tensor for tensor in tensors}
        header = header_bytes(tensors, metadata)
        self._offsets: dict[str, int] = {}
        self._end = len(header)
        for tensor in in_file_order(tensors):
            self._offsets[tensor.name] = self._end
            self._end += tensor.num_bytes
        self._digest = xxhash.xxh3_128(header)
        self._hashed = len(header)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (held until close)
        self._since_flush = 0
        self._write(memoryview(header))
        self._missing = set(self._planned)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor, on the CPU and of the planned shape and dtype (ValueError otherwise)."""
        planned = self._planned[name]
        if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype or tensor.device.type != "cpu":
            raise ValueError(f"{self.path}: {name} is {tensor.dtype} {list(tensor.shape)}, planned was {planned}")
        self._missing.remove(name)
        offset = self._offsets[name]
        hashing = offset == self._hashed
        self._file.seek(offset)
        if not planned.num_bytes:
            return
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), PART_BYTES):
            part = data[start : start + PART_BYTES]
            if hashing:
                self._digest.update(part)
            self._write(part)
        if hashing:
            self._hashed = offset + planned.num_bytes

    def _write(self, data: memoryview) -> None:
        self._since_flush += len(data)
        while len(data):
            data = data[self._file.write(data) :]
        if self._since_flush >= FLUSH_BYTES:
            start_writeback(self._file.fileno())
            self._since_flush = 0

    def close(self) -> None:
        """Flush to the disk and close. ValueError when a planned tensor never came."""
        try:
            if self._missing:
                raise ValueError(f"{self.path}: {sorted(self._missing)[0]} was planned and never written")
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close as it is."""
        self._file.close()

    def record(self) -> FileRecord:
        """Size and checksum; ValueError unless the tensors came in file order."""
        if self._hashed != self._end:
            raise ValueError(f"{self.path}: tensors did not come in file order, so there is no checksum")
        return FileRecord(self._end, self._digest.hexdigest())


def start_writeback(descriptor: int) -> None:
    """Ask the kernel to write what is dirty and forget it: a checkpoint is not read again soon."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def planned_of(tensors: Mapping[str, Tensor]) -> list[Planned]:
    """What `TensorFile` is told of tensors that are there already."""
    return [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write_tensor_file(
    path: Path, tensors: Sequence[Planned], values: Iterable[Tensor], *, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write a new, flushed file from the values (on any device) of the tensors in file order; its size and checksum."""
    file = TensorFile(path, tensors, metadata=metadata)
    try:
        for tensor, value in zip(in_file_order(tensors), values, strict=True):
            file.put(tensor.name, value.detach().cpu())
    except BaseException:
        file.abandon()
        raise
    file.close()
    return file.record()


def file_record(path: Path, *, from_disk: bool = False) -> FileRecord:
    """Size and checksum of a file as it is. from_disk: past the page cache, as far as the kernel allows."""
    digest = xxhash.xxh3_128()
    size = 0
    with open(path, "rb", buffering=0) as file:
        if from_disk:
            start_writeback(file.fileno())
        buffer = bytearray(PART_BYTES)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return FileRecord(size, digest.hexdigest())
