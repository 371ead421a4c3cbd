"""The published layout as files: config.json, model*.safetensors and, for several of them, an index. Never a pickle.

Reading looks at the headers of all files first, so that everything wrong with a folder is told before a byte of
weights moves; tensors then come one at a time, and each file is opened once. Writing streams: one tensor is in memory.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launcher.checkpoint.tensor_file import Planned as Planned  # what is written is told in the same words everywhere
from launcher.checkpoint.tensor_file import TensorFile

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
# safetensors' names
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class PublishedError(ValueError):
    """A folder that is not a published checkpoint of this architecture, or that may not be written to."""

    user_error = True


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a published checkpoint lies; dtype as safetensors names it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class PublishedReader:
    """Read access to a published folder. config: its config.json; tensors: what its files hold, by name.

    Raises PublishedError for a missing or damaged file and for a folder of pickles.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_json(folder / CONFIG)
        self.tensors: dict[str, Stored] = {}
        self._open: dict[Path, Any] = {}
        for file in self._files():
            for name, stored in _header(file):
                if name in self.tensors:
                    raise PublishedError(f"{file} and {self.tensors[name].file} both hold {name}: keep one of them")
                self.tensors[name] = stored

    def _files(self) -> list[Path]:
        if (self.folder / INDEX).exists():
            weight_map = _read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise PublishedError(f"{self.folder / INDEX}: no weight_map of tensor names to file names")
            files = [self.folder / name for name in sorted(set(weight_map.values()))]
            for file in files:
                if file.parent != self.folder or not file.is_file():
                    raise PublishedError(f"{self.folder / INDEX} names {file}, which is not a file in its own folder")
            return files
        files = sorted(self.folder.glob("model*.safetensors"))
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        if not files and pickles:
            raise PublishedError(
                f"{self.folder}: {pickles[0]} is a pickle, which can run code when it is opened; save it as safetensors"
            )
        if not files:
            raise PublishedError(f"{self.folder}: no model*.safetensors here")
        return files

    def discard(self, ending: str) -> None:
        """Forget the tensors whose names end so."""
        self.tensors = {name: stored for name, stored in self.tensors.items() if not name.endswith(ending)}

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, on the CPU."""
        file = self.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise PublishedError(f"{file}: {name} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishedError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise PublishedError(f"{path}: not a JSON object")
    return value


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (not a dict)
                part = content.get_slice(name)
                yield name, Stored(file, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise PublishedError(f"{file} is not a whole safetensors file: {error}") from None


def plan_shards(tensors: Sequence[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Consecutive runs of at most max_shard_bytes each; a larger tensor stands alone."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def write_published(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Sequence[Planned],
    read: Callable[[Planned], Iterable[tuple[str, Tensor]]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, the shards and their index into an existing folder; about one tensor is in memory at a time.

    read: gives the values of a tensor in its planned shape and dtype, together with those of the tensors planned after
    it that come from the same numbers (the scales of a quantised weight); for those it is not asked again.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    pending: dict[str, Tensor] = {}  # scales whose weight was the last of the shard before
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # transformers refuses files that do not say which framework wrote them
        file = TensorFile(folder / name, shard, metadata={"format": "pt"})
        try:
            for tensor in shard:
                if tensor.name not in pending:
                    pending.update(read(tensor))
                file.put(tensor.name, pending.pop(tensor.name))
        except BaseException:
            file.abandon()
            raise
        file.close()
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(folder / CONFIG, config)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def require_free(destination: Path) -> None:
    """Raise PublishedError unless the folder does not exist or is empty: nothing is ever overwritten."""
    if destination.is_symlink() or destination.exists():
        if not destination.is_dir():
            raise PublishedError(f"{destination} is there already and is no folder: name a new one")
        if any(destination.iterdir()):
            raise PublishedError(f"{destination} is there already and is not empty: name a new folder")


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name when the block ends well, and goes when it does not.

    Raises PublishedError for a destination that holds anything.
    """
    require_free(destination)
    destination = destination.resolve()
    temporary = destination.with_name(f".tmp-{destination.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush_files(temporary)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_files(folder: Path) -> None:
    """Everything in a folder reaches the disk, so that a rename after it never shows half a file."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
